"""Limits on logits and distributions: one row per kind of candidate, and how a caller overrides them.

The tensor bounds decide whether a candidate is what it claims to be; these limits decide whether its output is still
that of its source. They hold on trained models, for prompts of random tokens as well as text. On untrained weights,
whose logits react chaotically to every change, no fixed limit holds: there ``verify`` compares with noise of the same
size in the source's own weights (see ``noise``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gemma2tool.errors import UsageError, choices


@dataclass(frozen=True)
class Gates:
    """Limits; None: no limit.

    ``logits``, ``logits_rtol``: |difference| of every logit is at most ``logits + logits_rtol * |source|``. ``kl``,
    ``kl_p99``, ``kl_max``: KL(source || candidate) in nats per position: mean, 99th percentile, maximum. ``top1``:
    smallest share of positions with the same likeliest token. ``ppl_ratio``: perplexity of the candidate over that of
    the source, if the prompt is text. ``rmse``: RMSE / RMS of every quantized tensor, in place of its type's own limit.
    """

    logits: float | None = None
    logits_rtol: float | None = None
    kl: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1: float | None = None
    ppl_ratio: float | None = None
    rmse: float | None = None

    def overridden(self, limits: Mapping[str, float]) -> Gates:
        """These limits with some replaced; names with "-" or "_". Raises ``UsageError`` for an unknown
        name, and for limits of which one makes another void.
        """
        names = {field.name for field in dataclasses.fields(self)}
        given = {name.replace("-", "_"): value for name, value in limits.items()}
        for name in given:
            if name not in names:
                raise UsageError("gate.unknown", f"{name!r} is not a gate", hint=choices.hint(name, gate_names()))
        _check_limits(Gates(**given))
        return dataclasses.replace(self, **given)


def gate_names() -> list[str]:
    """Return the names of the limits, as the command line spells them."""
    return sorted(field.name.replace("_", "-") for field in dataclasses.fields(Gates))


def parse_gates(pairs: Iterable[str]) -> dict[str, float]:
    """Return limits from the command line's ``name=value`` pairs. Raises ``UsageError``, naming the invalid pair."""
    limits: dict[str, float] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if name.strip() in limits:
            raise UsageError("gate.contradiction", f"{name.strip()} is given two limits", hint="give one of them")
        try:
            limits[name.strip()] = float(text) if equals else float("nan")
        except ValueError:
            limits[name.strip()] = float("nan")
        if not limits[name.strip()] >= 0:
            raise UsageError("gate.value", f"{pair!r} is not name=number", hint="write for example --gate kl=0.05")
    Gates().overridden(limits)
    if limits.get("top1", 0.0) > 1:  # perhaps meant as a percentage
        raise UsageError(
            "gate.contradiction",
            f"top1={limits['top1']:g} is more than all positions",
            hint="top1=1 means all positions",
        )
    return limits


def _check_limits(gates: Gates) -> None:
    """Raises ``UsageError`` (``gate.contradiction``) for a limit that has no effect beside another."""
    for name, limit in (("kl", gates.kl), ("kl-p99", gates.kl_p99)):
        if limit is not None and gates.kl_max is not None and limit > gates.kl_max:
            raise UsageError(
                "gate.contradiction",
                f"{name}={limit:g} has no effect beside kl-max={gates.kl_max:g}, which is stricter",
                hint=f"leave out {name}, or raise kl-max",
            )


# Float32 forward passes of equal weights differ only by the order of additions: by up to 3.2e-5 between
# implementations, on logits up to 28. The mildest mistake (epsilon 1e-5 instead of 1e-6) changes them by 9e-5.
_EQUAL = Gates(logits=5e-5, logits_rtol=1e-5, kl=1e-6)

GATES: Mapping[str, Gates] = {
    "lossless": _EQUAL,
    # The rounding of a target's own convention (GGUF's w + 1): 6e-8 of a norm from float32, 5e-4 from float16.
    "convention": Gates(kl=1e-3, top1=0.98),
    "f16": Gates(kl=0.001, top1=0.98),
    "bf16": Gates(kl=0.005, top1=0.95),
    "q8_0": Gates(kl=0.005, top1=0.95),
    "int8": Gates(kl=0.02, top1=0.92),
    "keras-int8": Gates(kl=0.02, top1=0.92),
    "w8a8-int8": Gates(kl=0.02, top1=0.92),
    "w8a16": Gates(kl=0.02, top1=0.92),
    "gptq-8": Gates(kl=0.02, top1=0.92),
    **dict.fromkeys(("torchao-int8", "torchao-int8-dynamic"), Gates(kl=0.02, top1=0.92)),
    "mlx-8": Gates(kl=0.02, top1=0.92),
    "mlx-6": Gates(kl=0.02, top1=0.92),
    "mlx-mxfp8": Gates(kl=0.03, top1=0.90),
    "fp8-dynamic": Gates(kl=0.03, top1=0.90),
    "fp8-block": Gates(kl=0.03, top1=0.90),
    "mxfp8a16": Gates(kl=0.03, top1=0.90),
    **dict.fromkeys(("torchao-fp8", "torchao-fp8-dynamic"), Gates(kl=0.03, top1=0.90)),
    "sfp": Gates(kl=0.05, top1=0.88),
    "q6_k": Gates(kl=0.02, top1=0.92),
    "q5_k": Gates(kl=0.04, top1=0.88),
    "q5_1": Gates(kl=0.05, top1=0.87),
    "q5_0": Gates(kl=0.05, top1=0.87),
    "mlx-5": Gates(kl=0.05, top1=0.87),
    "q4_k": Gates(kl=0.15, top1=0.80),
    "nf4": Gates(kl=0.15, top1=0.80),
    "nf4-dq": Gates(kl=0.15, top1=0.80),
    "iq4_xs": Gates(kl=0.16, top1=0.80),
    "iq4_nl": Gates(kl=0.16, top1=0.80),
    "q4_1": Gates(kl=0.17, top1=0.80),
    "w4a16-asym": Gates(kl=0.17, top1=0.80),
    "awq-4": Gates(kl=0.17, top1=0.80),
    "q4_0": Gates(kl=0.22, top1=0.76),
    "w4a16": Gates(kl=0.22, top1=0.76),
    "w4afp8": Gates(kl=0.22, top1=0.76),
    "gptq-4": Gates(kl=0.22, top1=0.76),
    **dict.fromkeys(("torchao-int4", "torchao-int8-int4"), Gates(kl=0.22, top1=0.76)),
    "mlx-4": Gates(kl=0.22, top1=0.76),
    "keras-int4": Gates(kl=0.4, top1=0.68),
    "fp4": Gates(kl=0.22, top1=0.76),
    "fp4-dq": Gates(kl=0.22, top1=0.76),
    "nvfp4": Gates(kl=0.25, top1=0.74),
    "mlx-nvfp4": Gates(kl=0.25, top1=0.74),
    "nvfp4a16": Gates(kl=0.25, top1=0.74),
    "mxfp4a16": Gates(kl=0.4, top1=0.68),
    "mxfp4": Gates(kl=0.4, top1=0.68),
    "mlx-mxfp4": Gates(kl=0.4, top1=0.68),
    "q3_k": Gates(kl=0.6, top1=0.60),
    "iq3_s": Gates(kl=0.8, top1=0.60),
    "mlx-3": Gates(kl=0.8, top1=0.60),
    "iq3_xxs": Gates(kl=1.0, top1=0.55),
    "q2_k": Gates(kl=2.0, top1=0.45),
    "iq2_s": Gates(kl=2.0, top1=0.45),
    "iq2_xs": Gates(kl=2.5, top1=0.40),
    "iq2_xxs": Gates(kl=3.0, top1=0.35),
    "iq1_m": Gates(kl=4.0, top1=0.20),
    "iq1_s": Gates(kl=5.0, top1=0.15),
    "mlx-2": Gates(kl=8.0),
    "q1_0": Gates(kl=8.0),
    "q2_0": Gates(kl=8.0),
    "tq1_0": Gates(kl=8.0),
    "tq2_0": Gates(kl=8.0),
    "unknown": Gates(),
}
"""Kind -> default limits. The kind is the loosest type among those of a candidate's lossy tensors.

KL: about ten times what the type costs the repository's small trained model on random tokens (on text it is a third
less), and at least three times what llama.cpp's README gives for Llama 3 8B (0.0014 Q8_0, 0.0055 Q6_K, 0.031 Q4_K_M,
0.072 Q4_0). Ternary types, q1_0, q2_0 and mlx-2 destroy a model that was not trained for them, so their limits mean
little.
"""


def loosest(kinds: Iterable[str]) -> str:
    """The kind with the largest KL limit. Types without a row count as "unknown"; without any kind, "lossless"."""
    rows = {kind if kind in GATES else "unknown" for kind in kinds}
    if not rows:
        return "lossless"
    return max(rows, key=lambda kind: (GATES[kind].kl is None, GATES[kind].kl or 0.0, kind))
