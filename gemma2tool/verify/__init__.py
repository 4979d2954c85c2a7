"""Proof that a candidate checkpoint is the same model as its source, or a measure of how far it is: ``run.verify``."""
