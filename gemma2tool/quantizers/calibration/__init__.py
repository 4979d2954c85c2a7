"""Rounding that takes the inputs of a matrix into account: GPTQ, and the scale search of AWQ.

Pure functions on torch tensors: inputs of a matrix (tokens, I) and its rows (n, I) in; codes, zeros and scales out. A
matrix W computes X W^T of its inputs X, so a change D of W changes the output by a squared norm of D H D^T with H = X^T
X. H is all that these methods know of the text.

Results do not depend on the number of threads: the work is split into pieces of fixed sizes, and one thread computes
each piece. Callers run the pieces with torch on one thread each, through the ``Map`` they pass.
"""

from collections.abc import Callable, Iterable
from typing import Any

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""Runs the pieces: ``map`` itself, or that of a thread pool."""
