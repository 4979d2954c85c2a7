"""The reference forward pass: Gemma 2 in plain torch, whole (``model``) or streamed from a checkpoint."""

import torch as _torch


def _settle_math_kernels() -> None:
    """Call each elementwise function once, on one value, before several threads can.

    oneMKL 2024.2, which torch's builds for x86-64 carry, picks a function's kernel at its first call; when threads make
    that call at once, one of them may compute its share with a kernel of half the precision, and nothing says so
    (https://github.com/pytorch/pytorch/issues/188792). Seen here once: the second half of a prompt's logits 5e-4 off.
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


_settle_math_kernels()
