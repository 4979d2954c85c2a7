"""The reference forward pass: Gemma 2 in plain torch, whole (``model``) or streamed from a checkpoint
(``streaming``)."""
