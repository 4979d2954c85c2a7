"""``python -m gemma2tool.pipeline.checks`` prints docs/check.md, made from the catalog."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from gemma2tool.pipeline.checks.catalog import CATALOG

_HEAD = """\
# Checks

<!-- Made by `python -m gemma2tool.pipeline.checks > docs/check.md`. Edit gemma2tool/pipeline/checks/ instead. -->

`gemma2tool check PATH` says whether a checkpoint of any format is sane, without the one it was made from. It reads
every tensor once, in ranges of rows, and never runs what it reads; a chat template is rendered in a sandbox with
limits of time and memory. `--perplexity` (or `--text FILE`) also runs the float32 forward pass over a text,
`--sample` lets the model answer a question.

The first line is the verdict: `SANE`, `DOUBTFUL`, or `BROKEN` where there is an error. A sane file may still be wrong
in ways that only its source shows; the last line says so. Every finding follows on a line: its severity, where, what
was seen and what it means, what to do, and its id. With `--json` they are objects with these fields.

| exit code | meaning |
|---:|---|
| 0 | sane: notes at most |
| 1 | doubts or errors |
| 3 | the file cannot be read: truncated, a pointer or a page instead of weights, not a Gemma 2 |

An *error* cannot be right. A *doubt* is unlikely to be right. A *note* can be right and should be known. Ids and
severities are stable, messages are not. Where a finding has another severity than its row, its evidence was stronger.

`verify --reference SRC` finds much more: use it where the source is at hand. Without it, layers or tokens in another
order, gate and up exchanged, or a final norm with a 1 too much show in `--perplexity` only, and rotary embeddings of
the other convention, heads in another order and values that are slightly off hardly at all.
"""

_TAIL = """
## How the limits were chosen

A false alarm is as bad as a missed fault, so a limit lies far from every honest file and every planted mistake: the
trained fixture in every format and type, files that other projects' own code wrote, and random weights of several
distributions. No finding depends on a mean or a spread that only released models have, because norms of trained models
have means from below 0 to above 10.

- **A 1 too much or missing.** Exact evidence first: in float32 norms of a model in 16 bits, w is a bfloat16 (or
  float16) value; if hardly any value is and every value less 1 (or plus 1) is, then 1 was added (or subtracted).
  Otherwise the signs of all norms of the layers together: w starts at 0 and moves both ways, so 20 to 70 percent of
  the values are negative in honest files, and fewer than 0.2 percent where 1 was added; 1 + w below 0 is rare (0.1
  percent at most), and half of the values where 1 is missing.
- **Fit.** Training by gradients keeps the difference between the squared norms of two parameters that are multiplied
  by each other, channel by channel. So a norm's scale is correlated with the matrices that it belongs to, the rows of
  up_proj with the columns of down_proj, and the rows of v_proj with the columns of o_proj: 0.45 to 0.95 in the trained
  fixture, and about 0 where tensors do not belong together. A finding needs a model in which other tensors fit (0.5 at
  least), or another arrangement that fits better by 0.25 (norms: 0.3). In random weights nothing fits, and nothing is
  reported. What does not fit in a single layer is a note: a trained model may have such a layer.
- **Embedding scaled.** Rows have a median length of 0.5 to 7 in honest files; sqrt(hidden_size) is 48 to 68 in the
  released models. The limits are 0.1 and 18, and an RMS of 1.05.
- **Queries scaled.** The RMS of q_proj is 0.5 to 2 times that of k_proj. It is reported where it is less than twice
  head_dim ** -0.5 (1/8 in the 2B and 9B). A factor near 1, such as that between the scales of 128 and 144, cannot be
  seen.
- **Flipped bits.** The largest weights of trained models are about a thousand times the RMS. The limit is ten thousand:
  a flipped bit of the low exponent is below it.
- **Holes.** 512 consecutive zeros in a row of a matrix. Pruning to half of the weights leaves runs of about 30.
- **Rows.** Equal rows are reported from 1 percent of a projection, from 10 percent of the embedding: tokens that never
  occur in training can have equal rows.
"""


def document() -> str:
    """The text of docs/check.md."""
    return "\n".join(_lines()) + "\n" + _TAIL


def _lines() -> Iterator[str]:
    yield _HEAD
    yield "| id | severity | meaning | what to do |"
    yield "|---|---|---|---|"
    for entry in CATALOG.values():
        yield f"| `{entry.id}` | {entry.severity} | {entry.meaning} | {entry.remedy} |"


if __name__ == "__main__":
    sys.stdout.write(document())
