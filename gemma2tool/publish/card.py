"""The card of a release: README.md with front matter, as the Hugging Face hub reads it, made from receipts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma2tool.formats import packings
from gemma2tool.publish.engines import programs, usages
from gemma2tool.receipt.document import Receipt
from gemma2tool.storage.units import human_bytes
from gemma2tool.verify.reports.markdown import escaped
from gemma2tool.verify.reports.quality import closeness
from gemma2tool.version import __version__

_HOMEPAGE = "https://github.com/gemma2tool/gemma2tool"
_TERMS = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms."
_MADE_FROM = {"finetune": "a fine-tune of", "merge": "a merge with"}


@dataclass(frozen=True)
class CardEntry:
    """One output of a release, as its receipt describes it. ``type``: as it was asked for."""

    name: str
    type: str
    receipt: Receipt

    @property
    def format(self) -> str:
        return self.receipt.format

    def digests(self) -> Iterator[tuple[str, str]]:
        """Its files below the release's folder, and their SHA-256."""
        files = self.receipt.files
        is_file = files[0].name == self.name and len(files) == 1
        for file in files:
            yield (self.name if is_file else f"{self.name}/{file.name}"), file.sha256

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What was measured of its distributions."""
        gates = self.receipt.content["verification"]["gates"]
        return next((gate["metrics"] for gate in gates if gate["name"] == "distribution"), {})

    @property
    def bits_per_weight(self) -> float:
        """Bits of its files for each of its values, as every command counts them."""
        return 8 * self.receipt.nbytes / sum(math.prod(shape) for shape in self.receipt.shapes.values())


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card says besides its entries. ``relation``: of the source to ``base_model``. ``repository``: on the hub,
    if the release goes there. ``made``: a sentence on how codes were chosen. ``text``: what quality was measured on.
    ``imatrix``: the file of the importance matrix. ``adapters``: merged into the base model, with their scales.
    ``modelfiles``: names of files for ollama.
    """

    model: str
    entries: Sequence[CardEntry]
    license: str
    base_model: str | None
    relation: str
    quantized_by: str | None
    repository: str | None
    made: str
    text: str
    imatrix: str | None = None
    adapters: tuple[str, ...] = ()
    modelfiles: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The whole file."""
        import yaml

        front = yaml.safe_dump(self.front_matter(), sort_keys=False, allow_unicode=True)
        parts = [
            f"---\n{front}---\n",
            f"# {escaped(self.model)}, quantized\n",
            self._introduction(),
            self._table(),
            "## Run it\n",
            *(f"### {usage.program}\n\n```{usage.language}\n{usage.code}\n```\n" for usage in self._usages()),
            self._making(),
            self._verification(),
        ]
        return "\n".join(part for part in parts if part)

    def front_matter(self) -> dict[str, Any]:
        """What the hub reads."""
        formats = {entry.format for entry in self.entries}
        types = {entry.type for entry in self.entries}
        tags = ["gemma2", *(["gguf"] if "gguf" in formats else []), *(["mlx"] if "mlx" in formats else [])]
        tags += [method for method in packings.methods(types) if method not in tags]
        tags += [*(["imatrix"] if self.imatrix else []), "gemma2tool"]
        library = "transformers" if "hf" in formats else "mlx" if "mlx" in formats else "gguf"
        fields = {
            "license": self.license,
            "base_model": self.base_model,
            "base_model_relation": self.relation if self.base_model else None,
            "quantized_by": self.quantized_by,
            "library_name": library,
            "pipeline_tag": "text-generation",
            "tags": tags,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _introduction(self) -> str:
        base = model = escaped(self.model)
        if self.base_model:
            base = f"[{escaped(self.base_model)}](https://huggingface.co/{self.base_model})"
        terms = f" {_TERMS}" if self.license == "gemma" else ""
        if self.adapters:
            base += f" with the merged LoRA adapter {escaped(', '.join(self.adapters))}"
        elif self.base_model and self.relation in _MADE_FROM:
            base = f"{model}, {_MADE_FROM[self.relation]} {base}"
        return f"Files of {base}, made and verified by [gemma2tool]({_HOMEPAGE}) {__version__}.{terms}\n"

    def _table(self) -> str:
        has_interval = any(entry.metrics.get("kl_interval") is not None for entry in self.entries)
        interval = ", with its 95 % interval by bootstrap over windows" if has_interval else ""
        lines = [
            f"| file | type | size | bits per weight | KL{', 95 % interval' * has_interval} | same top-1 | good for |",
            "|---|---|---:|---:|---:|---:|---|",
            *(_row(entry) for entry in self.entries),
        ]
        note = (
            "KL: divergence of the next token's distribution from that of the source in float32, in nats; the mean over"
            f" {escaped(self.text)}{interval}. Same top-1: the share of"
            " positions with the source's likeliest token. Both were computed from the files themselves."
        )
        return "\n".join([*lines, "", note, ""])

    def _usages(self) -> Sequence[Any]:
        return usages(
            [(entry.name, entry.format, entry.type) for entry in self.entries], self.repository, self.modelfiles
        )

    def _making(self) -> str:
        imatrix = f" The matrix is `{self.imatrix}`." if self.imatrix else ""
        return f"## How it was made\n\n{escaped(self.made)}{imatrix}\n"

    def _verification(self) -> str:
        example = self.entries[0].name
        return f"""## How it was verified

Every file was read back, and every tensor held to the limits of its type against the source; config, tokenizer and chat
template were compared; the forward pass ran over both. The file's own library read it too, where there is one. Each
file's receipt (`NAME.receipt.json`) says what was measured, and lets anybody check the file without the source:

```bash
sha256sum -c SHA256SUMS
gemma2tool verify {example}
```
"""


def _row(entry: CardEntry) -> str:
    metrics = entry.metrics
    kl, interval, top1 = (metrics.get(name) for name in ("kl_mean", "kl_interval", "top1_agreement"))
    divergence = "not measured" if kl is None else f"{kl:.2g}"
    if interval is not None:
        divergence += f" ({interval[0]:.2g} to {interval[1]:.2g})"
    quality = "" if kl is None else f": {closeness(kl)}"
    cells = [
        f"`{entry.name}`",
        entry.type.upper() if entry.format == "gguf" else entry.type,
        human_bytes(entry.receipt.nbytes),
        f"{entry.bits_per_weight:.2f}",
        divergence,
        "" if top1 is None else f"{top1:.1%}",
        f"{', '.join(programs(entry.format, entry.type))}{quality}",
    ]
    return f"| {' | '.join(cells)} |"
