"""Several processes that calibrate one output together, through torch.distributed.

All of them open the source and go through the same stages. ``together`` says what is shared: pieces of work, whose
results everyone receives, and panels of sums. Nothing is added up across processes, so their number changes no bit.
``messages`` is what they send one another.
"""
