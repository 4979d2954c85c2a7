"""Rounding that looks at what a matrix is multiplied with: GPTQ, and the scale search of AWQ.

Pure mathematics on torch tensors: inputs of a matrix (tokens, I) and its rows (n, I) in; codes, zeros and scales out. A matrix W
computes X W^T of its inputs X, so what a change D of W does to its output is D H D^T with H = X^T X, and H is all that the methods
here are told of the text.

Results do not depend on the number of threads: work is cut into pieces of fixed sizes, each the arithmetic of one thread. Callers
run the pieces with torch on one thread each, through the ``Map`` they pass.
"""

from collections.abc import Callable, Iterable
from typing import Any

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""What the pieces are run with: ``map`` itself, or a thread pool's."""
