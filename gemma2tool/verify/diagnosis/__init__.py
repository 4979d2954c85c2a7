"""What is wrong with a candidate, in plain words: a catalogue of known mistakes and the search for them.

``diagnose.diagnose`` looks at two checkpoints, ``counterfactual.counterfactual`` at logits without their weights. Mistakes that are a
function of the source's tensors stand in tables by family (``norms``, ``attention``, ``mlp``, ``embedding``, ``numbers``,
``transposed``), and ``search`` finds the one, or the two in turn, that reproduce the candidate's. Mistakes whose numbers must be
measured first are in ``scales``, ``smoothing``, ``losses`` and ``damage``; those that are no tensor's in ``layers``, ``completeness``,
``config`` and ``tokenizer``.
"""
