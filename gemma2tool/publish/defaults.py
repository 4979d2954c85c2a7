"""What a release is made with where nothing else is asked for; imports nothing, so that ``--help`` can show it."""

from __future__ import annotations

BUILT_IN = "built-in"
"""In place of a file of text: the documentation and the modules of the Python that runs."""

TEMPLATE = "{model}-{type}"
"""Of the files' names."""

TOKENS = 10_000
"""That quality is measured on, at least."""

RELATIONS = ("quantized", "finetune", "merge")
"""What the source of a release can be to its base model: the same model, or one made from it."""
