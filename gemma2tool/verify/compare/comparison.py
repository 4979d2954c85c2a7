"""The result of comparing one tensor of a candidate with its source."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gemma2tool.verify.json_values import significant


@dataclass(frozen=True)
class TensorComparison:
    """One tensor's comparison. Errors are candidate minus source in float32.

    ``rule``: how the tensor was compared (see ``tensors``). ``ok``: whether it is within the rule's limits; if not,
    ``message`` says why. ``values``: number of values. ``rms``: of the source; ``rmse``: of the error. ``differing``:
    values whose bits are not the required ones (``exact``, ``cast``, ``expected``). ``bad_blocks``: blocks beyond the
    bound (``bound``). ``source_digest``, ``candidate_digest``: each side's ``digest.tensor_digest``.
    """

    name: str
    shape: tuple[int, ...]
    source_type: str
    candidate_type: str
    rule: str
    ok: bool
    values: int
    rms: float
    rmse: float
    max_abs_error: float
    differing: int = 0
    bad_blocks: int = 0
    nonfinite: int = 0
    source_nonfinite: int = 0
    message: str = ""
    source_digest: str = ""
    candidate_digest: str = ""

    @property
    def relative_rmse(self) -> float:
        """RMSE / RMS of the source; 0 if both are 0."""
        return self.rmse / self.rms if self.rms else (math.inf if self.rmse else 0.0)

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio in dB; infinite if there is no error."""
        ratio = self.relative_rmse
        return math.inf if ratio == 0 else -math.inf if math.isinf(ratio) else -20 * math.log10(ratio)

    def to_json(self) -> dict[str, Any]:
        content = {
            "rule": self.rule,
            "ok": self.ok,
            "shape": list(self.shape),
            "source_type": self.source_type,
            "candidate_type": self.candidate_type,
            "rmse": significant(self.rmse),
            "relative_rmse": significant(self.relative_rmse),
            "snr_db": significant(self.snr_db),
            "max_abs_error": significant(self.max_abs_error),
            "source_digest": self.source_digest,
            "candidate_digest": self.candidate_digest,
        }
        counts = ("differing", "bad_blocks", "nonfinite", "source_nonfinite")
        return content | {name: getattr(self, name) for name in counts if getattr(self, name)}
