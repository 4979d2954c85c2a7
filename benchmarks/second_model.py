"""Trains a second small Gemma 2 on other text than the fixture's, so that quality is not measured on one model alone.

    python benchmarks/second_model.py FOLDER                 # train, then the tables of quality.py for it
    python benchmarks/second_model.py FOLDER --types q4_k_m,iq2_xs --folder-types nf4
    python benchmarks/second_model.py FOLDER --cross q4_k_m  # calibrated on one kind of text, judged on the others
    python benchmarks/second_model.py FOLDER --text notes='/usr/share/doc/**/*.txt' --text code='src/**/*.c'

The text is what Debian installs: manual pages, translated manual pages, and Perl's modules; ``--text`` names other
files, and options of quality.py are passed on to it. The model has another shape than the fixture (4 layers, 8 heads of
32, intermediate size 768, 3.7 million parameters), and is trained by fixtures/train.py's code on one thread, in about
five minutes of processor time. FOLDER keeps it, with held-out tokens and calibration text of each kind; one that is
there is not trained again.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import itertools
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from processes import HERE, argument_parser

TEXTS = (
    "manual=/usr/share/man/man[578]/*",
    "translated=/usr/share/man/[defip][eflrst]/man*/*",
    "perl=/usr/share/perl/**/*.p[ml]",
)
"""German, Spanish, French, Italian and Polish are the translations that are large enough."""
CHARACTERS = 3_000_000
"""Characters of a kind that are trained on, at most."""
HELD_OUT_WINDOWS = 25
"""Held-out windows of a kind, at most."""
CALIBRATION_CHARACTERS = 400_000
STEPS = 1000
MATRIX_TYPES = ("q4_k_m", "q3_k_m", "q2_k", "iq4_xs", "iq3_xxs", "iq2_xs", "q5_k_m", "q4_0", "q4_k_s", "q3_k_s",
                "q5_k_s", "q2_k_s", "iq4_nl", "iq2_xxs", "iq2_s", "iq2_m", "iq3_xs", "iq3_s", "iq3_m")  # fmt: skip
NEAREST_TYPES = ("nf4", "mlx-4", "awq-4")


SHAPE = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
}


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", action="append", metavar="KIND=GLOB", help="text to train on; repeatable")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--types", default=",".join(MATRIX_TYPES), help="GGUF types; empty for none")
    parser.add_argument("--folder-types", default=",".join(NEAREST_TYPES), help="types of folders; empty for none")
    parser.add_argument("--cross", metavar="TYPES", help="one kind of text against the others, instead of the tables")
    arguments, options = parser.parse_known_args()
    if not (arguments.folder / "model.ckpt").exists():
        train_model(arguments.folder, arguments.text or TEXTS, arguments.steps)
    common = ("--model", arguments.folder, *options)
    if arguments.cross:
        return quality(*common, "--cross", arguments.cross)
    codes = [quality(*common, "--calibrated-gguf", arguments.types) if arguments.types else 0]
    codes += [quality(*common, "--calibrated", arguments.folder_types) if arguments.folder_types else 0]
    return max(codes)


def quality(*arguments: str | Path) -> int:
    """quality.py in a process of its own: its exit code."""
    return subprocess.run([sys.executable, HERE / "quality.py", *arguments], check=False).returncode


def train_model(folder: Path, texts: Sequence[str], steps: int) -> None:
    """Train the model and write it, its tokenizer, and the held-out tokens and the calibration text of each kind."""
    sys.path.insert(0, str(HERE.parent / "fixtures"))
    import export
    import torch
    import train
    import vocabulary
    from transformers import Gemma2Config

    torch.set_num_threads(train.THREADS)
    kinds = {kind: split(documents(pattern)) for kind, _, pattern in (text.partition("=") for text in texts)}
    training = [text for parts in kinds.values() for text in parts["train"]]
    export.write_tokenizer(folder, vocabulary.train(training))
    processor = vocabulary.load(folder / "tokenizer.model")
    held_out, calibration = {}, {}
    for kind, parts in kinds.items():
        windows = train.windows_of(np.array(processor.encode("\n\n".join(parts["heldout"]))))
        held_out[kind] = windows[:: max(1, len(windows) // HELD_OUT_WINDOWS)][:HELD_OUT_WINDOWS]
        calibration[kind] = "\n\n".join(parts["train"])[:CALIBRATION_CHARACTERS]
    write_texts(folder, held_out, calibration)
    tokens = train.windows_of(train.encode_documents(training, processor))
    validation = np.concatenate([windows[::5] for windows in held_out.values()])
    print(
        f"{tokens.size:,} training tokens; held-out windows: { ({k: len(v) for k, v in held_out.items()}) }", flush=True
    )
    config = Gemma2Config(**train.CONFIG.to_dict() | SHAPE, attn_implementation="eager")
    run = train.Run(folder, tokens, validation, steps, config)
    torch.set_float32_matmul_precision("medium")
    run.train()
    export.write_weights(folder, run.model.state_dict(), config)
    (folder / "run.pt").unlink(missing_ok=True)


def write_texts(folder: Path, held_out: dict[str, NDArray[np.int32]], calibration: dict[str, str]) -> None:
    """The texts of each kind, and of all kinds by turns: held-out windows, and paragraphs of calibration text."""
    for kind, windows in held_out.items():
        np.save(folder / f"heldout-{kind}.npy", windows)
        (folder / f"calibration-{kind}.txt").write_text(calibration[kind])
    np.save(folder / "heldout.npy", np.array([row for rows in zip(*held_out.values(), strict=False) for row in rows]))
    paragraphs = (text.split("\n\n") for text in calibration.values())
    mixed = itertools.chain.from_iterable(zip(*paragraphs, strict=False))
    (folder / "calibration.txt").write_text("\n\n".join(mixed)[:CALIBRATION_CHARACTERS])


def documents(pattern: str) -> dict[str, str]:
    """Text of the files of a pattern by path, in an order by hash, up to CHARACTERS."""
    chosen, size = {}, 0
    paths = [path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]
    for path in sorted(paths, key=lambda path: hashlib.sha256(path.encode()).digest()):
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if path.endswith(".gz") else data).decode("utf-8", "replace")
        if path.endswith(".gz"):
            text = manual_text(text)
        if len(text) >= 200 and " " * 32 not in text and text not in chosen.values():
            chosen[path] = text
            size += len(text)
        if size > CHARACTERS:
            break
    return chosen


def manual_text(roff: str) -> str:
    """A manual page's words: macros of headings, fonts and lists without their names, other requests left out."""
    text = re.sub(r"\\f(\[\w*\]|\(\w\w|\w)|\\[&|^/,:%]|\\s[-+]?\d", "", roff)
    text = re.sub(r"\\\(aq|\\\(cq", "'", re.sub(r"\\(-|\(hy)", "-", text)).replace("\\e", "\\")
    lines = []
    for line in text.splitlines():
        macro = re.match(r"[.'](SH|SS|B|I|BR|RB|BI|IB|IR|RI|IP|Sh|Nm|Fl|Xr) +(.*)", line)
        if macro:
            lines += ["", macro[2].replace('"', "")] if macro[1] in ("SH", "SS", "IP", "Sh") else [macro[2]]
        elif line[:1] not in (".", "'"):
            lines.append(line)
        elif re.match(r"\.(PP|TP|LP|P|Pp|sp)\b", line):
            lines.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def split(texts: dict[str, str]) -> dict[str, list[str]]:
    """Documents of training and held-out text: 1 in 12 is held out, by a hash of its name."""
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    for name, text in texts.items():
        held_out = hashlib.sha256(Path(name).name.encode()).digest()[0] < 256 / 12
        parts["heldout" if held_out else "train"].append(text)
    return parts


if __name__ == "__main__":
    sys.exit(main())
