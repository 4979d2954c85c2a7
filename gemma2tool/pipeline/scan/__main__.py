"""``python -m gemma2tool.pipeline.scan`` prints docs/scan.md, made from the catalog."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from gemma2tool.pipeline.scan.catalog import CATALOG

_HEAD = """\
# Scan

<!-- Made by `python -m gemma2tool.pipeline.scan > docs/scan.md`. Edit gemma2tool/pipeline/scan/ instead. -->

`gemma2tool scan PATH` shows what the files at PATH would do to whoever uses them. It loads, unpacks and runs nothing:
pickles are followed opcode by opcode, chat templates are read as syntax trees and rendered in a sandbox in a process
with limits of time and memory. PATH is a file or a folder, of any model.

```
$ gemma2tool scan model/
DANGEROUS: 1 danger, 1 odd in 7 files of model
danger: pytorch_model.bin (archive/data.pkl): it calls "os.system('id')", which no tensor needs: ...
odd: tokenizer_config.json (eos_token): U+202E (RIGHT-TO-LEFT OVERRIDE) at character 5: ...
```

`--json` prints one object with these fields: `path`, `files`, `clean`, `complete`, `skipped`, and for each of the
`findings` its `id`, `severity`, `file`, `where`, `line`, `message`, `gain` and `remedy`. `--sarif FILE` writes SARIF
2.1.0 for code scanning; its paths are relative to the workspace.

| exit code | meaning |
|---:|---|
| 0 | nothing dangerous or odd in what was read: notes at most |
| 1 | something is dangerous or odd |
| 3 | there is nothing at PATH |

A *danger* harms whoever loads or uses the file. *Odd* is what no honest file needs, or what changes what is loaded. A
*note* is good to know. Ids and severities are stable, messages are not.

The verdict is CLEAN if everything was read and nothing is dangerous or odd. It is INCOMPLETE, with exit code 0, if
nothing is but something could not be read: a damaged file, an archive of another kind, a pointer, an empty folder. What
was not read may be anything; `complete` in `--json` is false then. Neither verdict is an approval: see *What is not
looked for*.

## What a conversion does

Every conversion checks what it carries in the same way: chat templates, tokens, metadata. A dangerous chat template is
refused (exit code 3, `template.unsafe`); `--allow-unsafe-template` carries it anyway, with a warning. What is odd gives
a warning. Nothing is silently dropped or changed. Pickles are never loaded: the built-in reader knows only what stores
tensors, and refuses the rest.

## What is looked for
"""

_TAIL = """
## How it decides

- **Pickles**: by what tensors need, not by a list of threats. A name that is not known to be harmless is a danger,
  whatever module it is in; classes of libraries that trainers save (`transformers.training_args.TrainingArguments`) are
  odd. Protocols 0 to 5, several pickles in a file, pickles in pickles as bytes or text, as they are, in base64
  or in hexadecimal digits, damaged ones (what precedes the damage is executed), arrays of objects in .npy and .npz.
- **Archives**: zip, tar, and files compressed by gzip, bzip2, xz, lzma or zlib, whatever their names, up to five
  levels deep; members with wrong flags, names, types or checksums; a zip archive at the end of another file. What is
  not examined gives a note: other archives, encrypted members, an archive of more than 64 MiB inside another one, what
  a compressed file unpacks to beyond 64 MiB. More than five levels are odd, and so is an archive before another one.
- **Files that are not what they seem**: a file whose name is that of weights and that is none gives a note, with what
  its reader says. Pickles are recognized by their content, whatever their names. JSON that gemma2tool's own reader
  refuses (NaN, deep nesting, a byte order mark, keys that occur twice) is read again as loaders read it, so that
  nothing hides behind it; a file that is too long for that is odd.
- **Chat templates**: every branch of the syntax tree, after names that are put together (concatenated, reversed,
  formatted, joined, from variables) are evaluated; then rendered for conversations with and without a system message,
  tools, parts, an answer; then once more with all branches taken. Jinja has no endless loop, so what counts is time,
  memory, ranges and repetitions.
- **Triggers**: what messages say is followed through the syntax tree (variables, loops, macros, blocks, filters), and
  wherever it meets a text of the template, in a comparison, a search, a replacement or a table, the template looks for
  that text. Markup of conversations such as `</think>` or `/no_think`, and markup that the template itself writes, is
  not a trigger. Conditions on the length of a message, the number of messages, roles, the names of tools or the date
  are not examined, and neither is recursion that a condition stops.
- **Files that programs act on**: hooks and settings of a git repository, also below another name, in a submodule or in
  an archive; what clones contain (git-lfs's filters and hooks, the hub's transfer agents) is not reported, and hooks
  that are not executable are notes. In a Modelfile: files outside of the folder that is scanned, other registries,
  network paths; the names of models are notes. Package indexes other than PyPI's, PyTorch's, NVIDIA's and such.
- **Text**: control characters, the bidirectional controls of UAX 9, characters of zero width and tags; joiners where
  scripts and emoji need them are not reported. SentencePiece's vocabulary is not examined, because it contains such
  characters legitimately.

## What is not looked for

What the code of a `.py` file does; TensorFlow's SavedModel, ONNX, MessagePack and other formats that are not among
those that gemma2tool reads, which give a note; what SentencePiece's, gemma.cpp's and Orbax's own files hold beside
numbers; payloads that are text in other encodings and that nothing decodes; behavior that was trained into the weights.

## Beside other scanners

How many files are reported, of those that should be (hostile) and of those that should not be (honest), by modelscan
0.8.8, picklescan 1.0.5, fickling 0.1.12 and modelaudit 0.2.54 (issues of its severities warning and critical). In
parentheses: files that a scanner could not read. `python tests/campaigns/scanners.py --fetch FOLDER --peers PYTHON`
clones the projects' test files, which are not part of this repository, and repeats it. fickling makes its files while
its tests run.

| files | gemma2tool | modelscan | picklescan | fickling | modelaudit |
|---|---:|---:|---:|---:|---:|
| picklescan's hostile files: 94 | 94 | 28 (5) | 94 | 85 (9) | 89 |
| modelaudit's hostile pickles, archive, Keras and torch files: 26 | 26 | 18 (1) | 19 | 17 (3) | 25 |
| modelscan's hostile file: 1 | 1 | 1 | 1 | 0 (1) | 1 |
| GlyphHound's hostile chat templates, in tokenizer_config.json: 36 | 36 | 0 | 0 | 0 (36) | 18 |
| modelaudit's hostile chat templates: 23 | 23 | 0 | 0 | 0 (23) | 23 |
| honest: picklescan's and modelaudit's safe files: 23 | 0 | 0 (7) | 0 | 0 (14) | 7 |
| honest: chat templates, most of public repositories: 140 | 1 | 0 | 0 | 0 (140) | 8 |

The one is a trigger: it adds text to the prompt when the answer of a tool says "command not found" or the like.
"""


def document() -> str:
    """The text of docs/scan.md."""
    return "\n".join(_lines()) + "\n" + _TAIL


def _lines() -> Iterator[str]:
    yield _HEAD
    yield "| id | severity | meaning | what an attacker gains |"
    yield "|---|---|---|---|"
    for entry in CATALOG.values():
        yield f"| `{entry.id}` | {entry.severity} | {entry.meaning} | {entry.gain} |"


if __name__ == "__main__":
    sys.stdout.write(document())
