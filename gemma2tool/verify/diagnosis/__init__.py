"""Diagnosis: names the mistake that makes a candidate differ from its source, from a catalog of known mistakes.

``diagnose.diagnose`` compares two checkpoints; ``counterfactual.counterfactual`` works on logits without the weights
behind them. Mistakes that are a function of the source's tensors are tabulated by family (``norms``, ``attention``,
``mlp``, ``embedding``, ``numbers``, ``transposed``); ``search`` finds the one, or the sequence of two, that reproduces
the candidate's tensors. Mistakes whose parameters must be measured first are in ``scales``, ``smoothing``,
``requantized``, ``rearranged``, ``unrelated`` and ``damage``. Mistakes that do not concern a single tensor are in
``layers``, ``completeness``, ``config`` and ``tokenizer``.
"""
