"""What a server says of itself, held against the files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from gemma2tool.engines.servers.answers import Facts
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.engine_gates import failed
from gemma2tool.quantizers.gguf_types import GGUF_TYPES
from gemma2tool.quantizers.mixtures import ALIASES, FILE_TYPES
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.units import human_bytes
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.finding import Finding, GateResult

_FLOATS = frozenset(("f32", "f16", "bf16"))


class Identity:
    """``model``: why it is another model, ``quantization``: why it is another quantization; empty where nothing says
    so. ``same_bytes``: it has exactly the file's amount of weights.
    """

    def __init__(self, facts: Facts, candidate: Checkpoint) -> None:
        self.facts, self.candidate = facts, candidate
        self.model = "; ".join(self._other_model())
        self.same_bytes = facts.tensor_bytes is not None and facts.tensor_bytes == _tensor_bytes(candidate)
        self.quantization = "" if self.model else self._other_quantization()

    def _other_model(self) -> Iterator[str]:
        config, facts = self.candidate.config, self.facts
        for what, stated, own in (
            ("tokens in its vocabulary", facts.vocabulary, config.vocab_size),
            ("dimensions", facts.width, config.hidden_size),
            ("parameters", facts.parameters, self.candidate.parameters),
        ):
            if stated is not None and stated != own:
                yield f"{stated:,} {what}, the file {own:,}"

    def _other_quantization(self) -> str:
        stored, stated = _stored(self.candidate), _stated_type(self.facts.quantization)
        own = " and ".join(name for name, _ in stored.most_common(2))
        as_stated = f" as {quoted(self.facts.quantization, 40)}" if self.facts.quantization else ""
        nbytes = _tensor_bytes(self.candidate)
        if nbytes is not None and self.facts.tensor_bytes is not None:
            if nbytes == self.facts.tensor_bytes:
                return ""
            sizes = human_bytes(self.facts.tensor_bytes), human_bytes(nbytes)
            return f"it has {sizes[0]} of weights{as_stated}, the file {sizes[1]} ({own})"
        if stated is None or stated in stored or (stated in _FLOATS and stored.keys() <= _FLOATS):
            return ""
        if not stored.keys() <= _FLOATS and self.candidate.format != "gguf":
            return ""  # names of types differ between programs
        return f"it has weights{as_stated}, the file has {own}"

    def gate(self) -> tuple[GateResult, list[Cause]]:
        """The gate ``serving``, and what it found."""
        facts, gate = self.facts, "serving"
        metrics = {
            "program": facts.program,
            "model": facts.model,
            "quantization": facts.quantization,
            "tensor_bytes": facts.tensor_bytes,
            "parameters": facts.parameters,
        }
        what = f"{facts.program} serves {quoted(facts.model, 80)}"
        adapters = tuple(
            Finding(gate, "warning", None, f"it applies the adapter {quoted(name, 80)} to every request")
            for name in facts.adapters
        )
        if self.model:
            message = f"it serves another model: {self.model}"
            return failed(gate, message, metrics, adapters), [Cause("server.model", message)]
        if self.quantization:
            message = f"it serves another quantization: {self.quantization}"
            return failed(gate, message, metrics, adapters), [Cause("server.quantization", message)]
        as_type = f" ({quoted(facts.quantization, 40)})" if facts.quantization else ""
        known = any(value is not None for value in (facts.quantization, facts.parameters, facts.width))
        silent = "" if known else "; it does not tell of which type or size"
        return GateResult(gate, "passed", f"{what}{as_type}{silent}", metrics, adapters), []


def context_gate(facts: Facts, candidate: Checkpoint) -> GateResult:
    """How much of the model's context the server offers."""
    gate, own, stated = "context", candidate.config.max_position_embeddings, facts.context
    if stated is None:
        return GateResult(gate, "skipped", "it does not tell how long a conversation may be")
    metrics = {"context": stated, "max_position_embeddings": own}
    if stated == own:
        return GateResult(gate, "passed", f"{stated:,} tokens, as the model has", metrics)
    message = f"{stated:,} tokens, the model has {own:,}"
    message += ": longer conversations are cut or refused" if stated < own else ": it was not trained for more"
    return GateResult(gate, "reported", message, metrics, (Finding(gate, "warning", None, message),))


def _stored(candidate: Checkpoint) -> Counter[str]:
    """Values in matrices by stored type."""
    stored: Counter[str] = Counter()
    for tensor in candidate.tensors.values():
        if len(tensor.shape) > 1:
            stored[tensor.stored] += tensor.size
    return stored


def _tensor_bytes(candidate: Checkpoint) -> int | None:
    """The size of a GGUF's weights without its header; None for other formats."""
    if candidate.format != "gguf":
        return None
    total = 0
    for tensor in candidate.tensors.values():
        row = GGUF_TYPES.get(tensor.stored.upper())
        if row is None:
            return None
        total += tensor.size // row.block_elements * row.block_bytes
    return total


def _stated_type(name: str | None) -> str | None:
    """The type of most weights, by a name such as "Q4_K_M", "Q4_K - Medium" or "all F32"; None for other names."""
    if name is None:
        return None
    plain = re.sub(r"\s*\(guessed\)\s*$", "", name.lower().removeprefix("all ")).split(" - ")[0].strip()
    row = FILE_TYPES.get(ALIASES.get(plain, plain))
    if row is not None:
        return row.default.lower()
    return plain if plain.upper() in GGUF_TYPES else None
