"""llama.cpp's own server, in this process, from the xllamacpp wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def start(path: Path, *, template: str | None = None, ignore_eos: bool = False) -> Any:
    """A server of a GGUF on a free port of the loopback interface; ``listening_address`` is where. It runs as long as
    the object lives."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.verbosity = str(path), 0, -1
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params = 1024, 1, False, False
    params.cpuparams.n_threads, params.n_gpu_layers, params.no_extra_bufts = 1, 0, True
    if template is not None:
        params.chat_template = template
    params.sampling.ignore_eos = ignore_eos
    return xllamacpp.Server(params)
