"""Record terminal sessions as SVG pictures, for the README and the guide: ``python scripts/sessions.py [NAME ...]``.

Every session runs its commands in a terminal of its own, on the model in fixtures/, and draws what the screen shows at
the end. Needs pyte, a terminal emulator, besides the package (``pip install pyte``).
"""

from __future__ import annotations

import io
import os
import pty
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
FIXTURE = ROOT / "fixtures" / "tiny-gemma2"
OUT = ROOT / "docs" / "sessions"
WIDTH, HEIGHT = 100, 200

BREAK = (
    "from safetensors.numpy import load_file, save_file\n"
    "import ml_dtypes\n"
    "path = 'from-a-stranger/model.safetensors'\n"
    "weights = load_file(path)\n"
    "save_file({n: w + w.dtype.type(1) if 'input_layernorm' in n else w for n, w in weights.items()}, path)\n"
)
BUDGET = "--calibration text.txt --calibration-samples 4 --calibration-length 64"

SESSIONS: dict[str, tuple[str, ...]] = {
    "convert": ("gemma2tool convert model.ckpt model-hf", "gemma2tool inspect model-hf"),
    "quantize": (
        "gemma2tool quantize model.ckpt model-Q4_K_M.gguf --type q4_k_m",
        "gemma2tool verify model-Q4_K_M.gguf",
    ),
    "budget": (f"gemma2tool quantize model.ckpt fits.gguf --target-size 4MB {BUDGET}",),
    "broken": (
        "!gemma2tool convert -q model.ckpt original",
        "!cp -r original from-a-stranger",
        f"!{sys.executable} -c {shlex.quote(BREAK)}",
        "gemma2tool check from-a-stranger",
        "gemma2tool verify from-a-stranger --reference original | head -4",
    ),
    "publish": (
        "gemma2tool release model.ckpt release --types q4_k_m,q8_0 --name Tiny-Gemma-2 --text text.txt",
        "ls release",
        "gemma2tool verify release",
    ),
}
"""The commands of each session; those that begin with ! are not shown."""


def main(names: list[str]) -> None:
    OUT.mkdir(exist_ok=True)
    for name in names or SESSIONS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            for file in FIXTURE.iterdir():
                shutil.copy(file, folder)
            (folder / "text.txt").write_text((FIXTURE / "heldout.txt").read_text("utf-8")[:40_000], "utf-8")
            shown = Text()
            for command in SESSIONS[name]:
                screen = record(command.removeprefix("!"), folder)
                if not command.startswith("!"):
                    shown.append("$ ", "bold green").append(command, "bold").append("\n").append_text(screen)
        draw(name, shown)


def record(command: str, folder: Path) -> Text:
    """What a terminal shows after ``command`` ran in ``folder``."""
    screen = pyte.Screen(WIDTH, HEIGHT)
    stream = pyte.ByteStream(screen)
    master, slave = pty.openpty()
    environment = dict(
        os.environ,
        COLUMNS=str(WIDTH),
        LINES=str(HEIGHT),
        TERM="xterm-256color",
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    with subprocess.Popen(
        command, shell=True, cwd=folder, env=environment, stdin=slave, stdout=slave, stderr=slave
    ) as run:
        os.close(slave)
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:  # the last process that held the terminal has ended
                break
            if not data:
                break
            stream.feed(data)
        run.wait()
    os.close(master)
    return contents(screen)


def contents(screen: pyte.Screen) -> Text:
    """The lines of the screen down to the last that is not empty, with their colors."""
    text = Text()
    last = max((y for y in range(HEIGHT) if screen.display[y].strip()), default=-1)
    for y in range(last + 1):
        for x in range(len(screen.display[y].rstrip())):
            cell = screen.buffer[y][x]
            color = {"default": "", "brown": "yellow"}.get(cell.fg, cell.fg)
            text.append(cell.data, f"{'bold ' if cell.bold else ''}{color}".strip())
        text.append("\n")
    return text


def draw(name: str, shown: Text) -> None:
    console = Console(width=WIDTH, record=True, file=io.StringIO(), force_terminal=True)
    console.print(shown, end="")
    console.save_svg(str(OUT / f"{name}.svg"), title=f"gemma2tool: {name}", clear=False, unique_id=f"session-{name}")


if __name__ == "__main__":
    main(sys.argv[1:])
