"""The logits of a GGUF as llama.cpp computes them, for quality.py: a second opinion on what the built-in forward pass
measures.

    python benchmarks/llama_cpp_logits.py FILE IDS.npy OUT.npy      # ids (windows, T) to logits (windows * T, V)

llama.cpp runs in the process that this command is, through the adapter that ``verify --engine llama.cpp`` uses.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


def llama_cpp_logits(path: Path, ids: NDArray[np.int64]) -> Logits:
    """The logits (windows * T, V) of ``ids`` (windows, T), each window by itself, computed in another process."""
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "ids.npy", Path(folder) / "logits.npy"
        np.save(question, ids)
        subprocess.run([sys.executable, __file__, path, question, answer], check=True)
        logits: Logits = np.load(answer)
    return logits


def run_here(path: str, ids: NDArray[np.int64]) -> Logits:
    """The logits, computed in this process, which keeps llama.cpp's memory until it ends."""
    from gemma2tool.engines.adapters.llama_cpp import answer

    windows = []
    for window in ids:
        prompt = {"ids": window.tolist(), "positions": len(window), "new_tokens": 0}
        messages = list(answer({"path": path, **prompt, "texts": [], "messages": [], "threads": 1}))
        logits = next((message for message in messages if message.content["kind"] == "logits"), None)
        if logits is None:
            raise RuntimeError(f"{path}: llama.cpp: {messages[-1].content}")
        windows.append(np.frombuffer(logits.payload, np.float32).reshape(logits.content["shape"]))
    return np.concatenate(windows)


if __name__ == "__main__":
    file, question, answer_file = sys.argv[1:]
    np.save(answer_file, run_here(file, np.load(question)))
