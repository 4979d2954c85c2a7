"""Sensitivity: what each matrix of a model, stored in each type, costs in KL divergence at the output.

``collect`` makes a table from a text, ``table`` keeps, reads, writes and merges it, ``predict`` adds it up. A budget
(``pipeline.budget``) chooses from it.
"""
