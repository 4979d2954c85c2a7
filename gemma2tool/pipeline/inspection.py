"""What a checkpoint is, from its headers alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2tool.errors import InputRefused
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is, according to its headers.

    - ``size``: "2b", "9b" or "27b" if the shapes are those of a release, else None.
    - ``parameters``: the number of values of all tensors. ``stored``: (stored type, tensors, values).
    - ``tensors``: (name, shape, stored type), in the model's order.
    - ``config``: the config, as Hugging Face's config.json spells it.
    - ``nbytes``: the size of the checkpoint's files.
    - ``vocabulary``: the number of pieces in the tokenizer; 0 if there is none.
    - ``stops``: (id, text) of the tokens at which the program that runs the checkpoint ends a text; the text is None if
      no tokenizer has it.
    - ``templates``: the names of the chat templates.
    - ``run_command``: a command line that runs the checkpoint in the program it is usually used with; empty if there is
      none.
    """

    path: Path | str
    format: str
    size: str | None
    parameters: int
    stored: tuple[tuple[str, int, int], ...]
    tensors: tuple[tuple[str, tuple[int, ...], str], ...]
    assets: tuple[str, ...]
    warnings: tuple[str, ...]
    config: dict[str, Any]
    nbytes: int = 0
    vocabulary: int = 0
    stops: tuple[tuple[int, str | None], ...] = ()
    templates: tuple[str, ...] = ()
    run_command: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Bits of its files for each of its values."""
        return 8 * self.nbytes / max(self.parameters, 1)

    def to_json(self, *, tensors: bool = False) -> dict[str, object]:
        """Return the inspection as ``--json`` prints it, including every tensor if requested."""
        content: dict[str, object] = {
            "path": str(self.path),
            "format": self.format,
            "size": self.size,
            "bytes": self.nbytes,
            "parameters": self.parameters,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "stops": [{"id": id, "text": text} for id, text in self.stops],
            "chat_templates": list(self.templates),
            "run": self.run_command,
            "stored": {name: {"tensors": count, "values": values} for name, count, values in self.stored},
            "assets": list(self.assets),
            "warnings": list(self.warnings),
            "config": self.config,
        }
        if tensors:
            content["tensors"] = [
                {"name": name, "shape": list(shape), "stored": stored} for name, shape, stored in self.tensors
            ]
        return content


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Describe an open checkpoint."""
    stored: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for tensor in checkpoint.tensors.values():
        stored[tensor.stored][0] += 1
        stored[tensor.stored][1] += tensor.size
    tokenizer = _tokenizer(checkpoint)
    stops = sorted({*tokenizer.stops(checkpoint.config), *tokenizer.implied_stops})
    return Inspection(
        path=checkpoint.known_as,
        format=checkpoint.format,
        size=checkpoint.config.size_name,
        parameters=checkpoint.parameters,
        stored=tuple((name, count, values) for name, (count, values) in sorted(stored.items())),
        tensors=tuple(
            (name, tuple(checkpoint.tensors[name].shape), checkpoint.tensors[name].stored) for name in checkpoint.specs
        ),
        assets=tuple(sorted(checkpoint.assets)),
        warnings=checkpoint.all_warnings,
        config=checkpoint.config.to_hf(),
        nbytes=checkpoint.file_bytes,
        vocabulary=tokenizer.size,
        stops=tuple((id, tokenizer.spelling(id)) for id in stops),
        templates=tuple(tokenizer.chat_templates),
        run_command="" if checkpoint.address else checkpoint.facts.command_for(checkpoint.path),
    )


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Its tokenizer; an empty one where it cannot be read, which is for other commands to refuse."""
    try:
        return checkpoint.tokenizer
    except InputRefused as error:
        checkpoint.warnings.append(f"its tokenizer cannot be read: {error.message}")
        return Tokenizer()
