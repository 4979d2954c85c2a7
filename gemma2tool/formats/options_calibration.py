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
    """Choose codes and scales by what the model computes on a text. If the type quantizes the embedding, the embedding
    is calibrated too, as the output head that it also is.

    - ``text``: a file of UTF-8 text or of token ids (.npy). ``hessians``: a file that ``calibrate`` wrote, instead of a
      text. If neither is given, nothing is calibrated.
    - ``samples``: the number of sequences to run (default: 128). ``length``: tokens per sequence (default: 512).
    - ``act_order``: round columns with large inputs first.
    - ``damping``: the share of its mean that is added to the Hessian's diagonal (default: 0.01).
    - ``method``: "refit" (the default) fits scales to the codes; "textbook" is GPTQ or AWQ as published.
    - ``hessian_block``: treat columns of different blocks of this size as independent; None: one block for all columns.
    - ``hessian``: "model" (the default) minimizes the KL divergence of the model's predictions; "layer" minimizes the
      error of each layer's outputs and needs no gradients.
    - ``tune_norms``: afterwards, tune the norms for the same goal, on other sequences of the text.
    - ``norm_checksums``: the checksums that the file records for its tuned norms; see ``model.norm_checksums``.
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
        """Raise ``UsageError`` for options that do not go together or have no effect."""
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
        """Return the calibration with the type's default Hessian filled in, if it has a choice, so that plans and
        receipts name it.
        """
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
