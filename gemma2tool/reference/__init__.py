"""The reference forward pass: Gemma 2 in plain torch, in memory (``model``) or streamed from a checkpoint
(``streaming``)."""

import torch as _torch


def _select_math_kernels() -> None:
    """Call each elementwise function once, on one value, before several threads call it.

    oneMKL 2024.2, part of torch's builds for x86-64, selects a function's kernel at its first call. If several threads
    make that call at the same time, one of them may silently compute its share with a kernel of half the precision
    (https://github.com/pytorch/pytorch/issues/188792). Observed once: the second half of a prompt's logits was off by
    5e-4.
    """
    for dtype in (_torch.float32, _torch.float64):
        one = _torch.ones(1, dtype=dtype)
        for function in (
            _torch.cos,
            _torch.sin,
            _torch.tanh,
            _torch.exp,
            _torch.log,
            _torch.sqrt,
            _torch.rsqrt,
            _torch.erf,
        ):
            function(one)
        _torch.pow(one, 0.5)
        _torch.softmax(one, dim=0)
        _torch.nn.functional.gelu(one, approximate="tanh")


_select_math_kernels()
