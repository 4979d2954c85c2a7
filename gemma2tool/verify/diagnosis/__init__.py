"""What is wrong with a candidate, in plain words: a catalogue of known mistakes and the search for unknown ones."""
