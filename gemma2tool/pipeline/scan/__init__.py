"""What a checkpoint's files would do to the person or the program that uses them, found without running any of it.

``run`` walks over the files; one module a kind of danger: pickles, archives, Keras layers, chat templates, hidden
characters, code. ``catalog`` lists every finding that there can be. ``gate`` is what every conversion asks.
"""
