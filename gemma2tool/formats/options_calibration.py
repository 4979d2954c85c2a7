"""What a user may ask of a calibration, as typed options (see ``options``)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from gemma2tool.errors import UsageError
from gemma2tool.formats.option_info import FOLDERS_QUANTIZED, GGUF_QUANTIZED, normalize, option, option_fields
from gemma2tool.model.format_facts import CALIBRATION_KEYS

CALIBRATED_TYPES = (*FOLDERS_QUANTIZED, *GGUF_QUANTIZED)
GPTQ_TYPES = ("gptq-4", "gptq-8")
_TEXTBOOK_TYPES = (*GPTQ_TYPES, "w4a16", "w4a16-asym", "w4afp8", "awq-4")
HESSIANS = ("model", "layer")
"""What an error is weighed by; the first is the default."""


@dataclass(frozen=True)
class Calibration:
    """Codes and scales are chosen by what the model does with a text. An embedding that the type quantizes is
    calibrated too, as the output head that it also is.

    ``text``: a file of UTF-8 text, or of token ids (.npy). ``hessians``: a file that ``calibrate`` wrote, in place of
    ``text``; neither: no calibration. ``samples``: sequences to run (128), ``length``: tokens of a sequence (512).
    ``act_order``: columns with large inputs are rounded first. ``damping``: share of its mean that is added to the
    Hessian's diagonal (0.01). ``method``: "refit" (the default), scales fitted to the codes, or "textbook", GPTQ or AWQ
    as published. ``hessian_block``: columns of different blocks count as independent; None for the whole.
    ``hessian``: "model" (the default) keeps the KL divergence of the model's predictions low, "layer" the error of each
    layer's outputs, which needs no gradients. ``tune_norms``: afterwards the norms are tuned for the same, on other
    sequences of the text; ``norm_checksums``: what the file says of them, see ``model.norm_checksums``.
    """

    HEADING: ClassVar[str] = "Calibration"

    text: Path | None = option(
        None,
        "--calibration",
        "choose codes by what the model does with this text (UTF-8), or with token ids (.npy).",
        key="calibration",
        metavar="FILE",
        types=CALIBRATED_TYPES,
        id="calibration.type",
    )
    samples: int | None = option(
        None,
        "--calibration-samples",
        "sequences to run. Default: 128.",
        key="calibration_samples",
        metavar="N",
        types=CALIBRATED_TYPES,
        minimum=1,
    )
    length: int | None = option(
        None,
        "--calibration-length",
        "tokens of a sequence. Default: 512.",
        key="calibration_length",
        metavar="T",
        types=CALIBRATED_TYPES,
        minimum=16,
    )
    act_order: bool = option(
        False,
        "--act-order",
        "round columns with large inputs first; some kernels run such files more slowly.",
        types=GPTQ_TYPES,
    )
    damping: float | None = option(
        None,
        "--damping",
        "share of its mean added to the Hessian's diagonal. Default: 0.01.",
        types=CALIBRATED_TYPES,
        minimum=0.0,
        maximum=1.0,
    )
    method: str | None = option(
        None,
        "--calibration-method",
        "refit (default): scales fitted to the codes; textbook: as GPTQ, or for awq-4 AWQ, is published.",
        key="calibration_method",
        metavar="METHOD",
        types=_TEXTBOOK_TYPES,
        choices=("refit", "textbook"),
    )
    hessian_block: int | None = option(
        None,
        "--hessian-block",
        "treat columns of different blocks of N as independent: less memory and time, slightly worse.",
        metavar="N",
        types=CALIBRATED_TYPES,
        minimum=32,
    )
    hessian: str | None = option(
        None,
        "--hessian",
        "model (default): the codes keep the model's predictions; layer: each layer's outputs, in less time.",
        metavar="WHOSE",
        types=GGUF_QUANTIZED,
        choices=HESSIANS,
    )
    hessians: Path | None = option(
        None,
        "--hessians",
        "choose codes by a file of 'gemma2tool calibrate --hessians', instead of by --calibration.",
        key="hessians",
        metavar="FILE",
        types=CALIBRATED_TYPES,
        id="calibration.type",
    )
    tune_norms: bool = option(
        False,
        "--tune-norms",
        "then tune the norms on other parts of the text; kept only where a held-out part agrees.",
        types=GGUF_QUANTIZED,
    )
    norm_checksums: str = ""

    def __post_init__(self) -> None:
        normalize(self)

    @property
    def is_asked(self) -> bool:
        return self.text is not None or self.hessians is not None

    def check(self) -> None:
        """Raises ``UsageError`` for options that do not go together, or have no effect."""
        if not self.is_asked:
            for option_field, info in option_fields(Calibration):
                if getattr(self, option_field.name) != option_field.default:
                    raise UsageError(
                        "option.ignored",
                        f"{info.flag} has no effect without --calibration",
                        hint="pass a text with --calibration",
                    )
        if self.hessians is None:
            return
        if self.text is not None:
            raise UsageError("hessians.calibration", "--calibration and --hessians both decide the codes")
        of_text = {
            "--calibration-samples": self.samples,
            "--calibration-length": self.length,
            "--hessian-block": self.hessian_block,
            "--tune-norms": self.tune_norms,
        }
        for flag, value in of_text.items():
            if value:
                hint = f"leave out {flag}, or pass the text with --calibration instead of --hessians"
                raise UsageError("option.ignored", f"{flag} has no effect with --hessians", hint=hint)

    def for_type(self, type: str | None) -> Calibration:
        """With the Hessian that a type has by default, if it has a choice: so plans and receipts name it."""
        if not self.is_asked or self.hessian is not None or type not in GGUF_QUANTIZED:
            return self
        return replace(self, hessian=HESSIANS[0])

    @property
    def metadata(self) -> dict[str, str]:
        """What an output says of its calibration; nothing without one."""
        path = self.text or self.hessians
        if path is None:
            return {}
        hessian = {} if self.hessian is None else {f"{CALIBRATION_KEYS}hessian": self.hessian}
        return {f"{CALIBRATION_KEYS}file": path.name, **hessian}
