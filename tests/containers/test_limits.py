"""All hostile files in one fresh process: little memory, nothing heavy imported, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gemma2tool.quantizers.gguf_types import GGML_BLOCKS
from tests.support.hostile import gguf as hostile_gguf
from tests.support.hostile import safetensors as hostile_safetensors
from tests.support.hostile import torch as hostile_torch
from tests.support.paths import ROOT

SUITES = {"safetensors": hostile_safetensors.CASES, "gguf": hostile_gguf.CASES, "torch_zip": hostile_torch.CASES}


@pytest.mark.slow
def test_refusals_are_cheap(tmp_path: Path) -> None:
    plan = []
    for module, cases in SUITES.items():
        for index, case in enumerate(cases):
            path = tmp_path / f"{module}-{index}"
            path.write_bytes(case.data)
            plan.append((module, str(path), case.id))
    assert len(plan) >= 250
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    before = sorted(os.listdir(tmp_path))
    code = """
        import json, re, sys
        from gemma2tool.errors import InputRefused
        from gemma2tool.containers import gguf, safetensors
        from gemma2tool.containers.torch_zip import reader as torch_zip
        blocks = {int(number): tuple(sizes) for number, sizes in json.loads(sys.argv[1]).items()}
        readers = {
            "safetensors": safetensors.read_header,
            "gguf": lambda path: gguf.read_header(path, blocks),
            "torch_zip": torch_zip.read_index,
        }
        wrong = []
        for module, path, id in json.load(open("plan.json")):
            try:
                readers[module](path)
                wrong.append((path, id, None))
            except InputRefused as error:
                if error.id != id:
                    wrong.append((path, id, error.id))
        libraries = ("torch", "numpy", "gguf", "safetensors", "pickle", "hypothesis")
        heavy = [name for name in libraries if name in sys.modules]
        # ru_maxrss would count the parent's memory at the time of the fork
        peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
        print(json.dumps([wrong, heavy, int(peak[1])]))
    """
    root = ROOT
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), json.dumps(dict(GGML_BLOCKS))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    wrong, heavy, peak_kib = json.loads(done.stdout)
    assert wrong == []
    assert heavy == []
    assert peak_kib < 200 << 10
    assert sorted(os.listdir(tmp_path)) == before
