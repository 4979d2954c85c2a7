"""The options of calibrated rounding: ``--calibration`` and what goes with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from gemma2tool.errors import UsageError

_NOT_FOR = {"act_order": ("awq-", "w4a16"), "damping": ("awq-",)}
"""How the names of types begin that an option does nothing for."""
_FOR = {"act_order": "gptq-4 and gptq-8", "damping": "gptq-4, gptq-8, w4a16 and w4a16-asym"}


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """How ``quantize`` calibrates; the fields are the options, see ``groups``."""

    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="gptq-4, gptq-8, w4a16, w4a16-asym (by GPTQ), awq-4 (by AWQ): choose codes by what the model does with this text (UTF-8), "
            "or token ids (.npy).",
        ),
    ] = None
    calibration_samples: Annotated[
        int | None, typer.Option("--calibration-samples", min=1, metavar="N", help="Sequences to run. Default: 128.")
    ] = None
    calibration_length: Annotated[
        int | None,
        typer.Option("--calibration-length", min=16, metavar="T", help="Tokens of a sequence. Default: 512."),
    ] = None
    act_order: Annotated[
        bool,
        typer.Option("--act-order", help="GPTQ: round columns with large inputs first; some kernels run it slower."),
    ] = False
    damping: Annotated[
        float | None,
        typer.Option(
            "--damping",
            min=0.0,
            max=1.0,
            help="GPTQ: share of its mean added to the Hessian's diagonal. Default: 0.01.",
        ),
    ] = None
    hessian_block: Annotated[
        int | None,
        typer.Option(
            "--hessian-block",
            min=32,
            metavar="N",
            help="Take columns of different blocks of N for independent: less memory and time, somewhat worse.",
        ),
    ] = None

    def extra(self, types: str) -> dict[str, object]:
        """As ``WriteOptions.extra`` has them, for these types; UsageError for options that would do nothing."""
        given = {name: value for name, value in asdict(self).items() if value not in (None, False)}
        for name in given:
            if "calibration" not in given:
                raise UsageError(
                    "option.ignored",
                    f"{_flag(name)} means nothing without --calibration",
                    hint="give a text with --calibration",
                )
            for each in types.split(","):
                if each.strip().startswith(_NOT_FOR.get(name, ())):
                    raise UsageError(
                        "option.ignored", f"{_flag(name)} means nothing for {each}", hint=f"it is for {_FOR[name]}"
                    )
        return given


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
