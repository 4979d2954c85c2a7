"""The keys of a recipe: the options of ``convert`` and ``quantize``, as they are typed, without the dashes.

The keys of an output's options follow from the typed options in ``formats``, see ``formats.option_info``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemma2tool.formats.option_info import OptionInfo, option_fields, parse_size
from gemma2tool.formats.options import GGUFOptions, PackingOptions, SplitOptions
from gemma2tool.formats.options_budget import Budget
from gemma2tool.formats.options_calibration import Calibration

Kind = Literal["text", "file", "model", "flag", "integer", "number"]
"""What a value is: ``file``: a path, ``model``: a path or an address."""

SOURCE, OUTPUT, OUTPUTS, RUNS, TYPE = "source", "output", "outputs", "runs", "type"


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key: ``field`` of the dataclass that ``group`` names, from a value of ``kind``, or a list of them where
    ``repeated``. ``of_output``: it may stand in an output, not only beside a source. ``parse``: from the value's text.
    ``inverted``: the field is the opposite. ``decides``: it decides what the output is or how it was verified.
    """

    name: str
    group: str
    field: str
    kind: Kind = "text"
    of_output: bool = False
    repeated: bool = False
    parse: Callable[[str], Any] | None = None
    inverted: bool = False
    decides: bool = True
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None


OPTION_GROUPS: Mapping[str, type[Any]] = {
    "split": SplitOptions,
    "gguf": GGUFOptions,
    "packing": PackingOptions,
    "calibration": Calibration,
    "budget": Budget,
}
"""The typed options of an output, by the names of ``WriteOptions``' fields; a budget is the request's."""

_OF_SOURCE = (
    Key(name=SOURCE, group="request", field="source", kind="model"),
    Key(name="config", group="request", field="config", kind="model"),
    Key(name="lora", group="request", field="adapters", kind="model", repeated=True),
    Key(name="keep-download", group="run", field="keep_download", kind="file", decides=False),
    Key(name="no-verify", group="request", field="verify", kind="flag", inverted=True),
    Key(name="tokens", group="checks", field="tokens", kind="file"),
    Key(name="text", group="checks", field="text", kind="file"),
    Key(name="gate", group="checks", field="gates", repeated=True),
    Key(name="sample", group="checks", field="sample", kind="integer", minimum=1, decides=False),
    Key(name="force", group="run", field="force", kind="flag", decides=False),
    Key(name="restart", group="run", field="restart", kind="flag", decides=False),
    Key(name="no-receipt", group="run", field="receipt", kind="flag", inverted=True, decides=False),
    Key(name="no-readers", group="run", field="readers", kind="flag", inverted=True),
    Key(name="allow-nonfinite", group="run", field="allow_nonfinite", kind="flag"),
    Key(name="clip-f16", group="run", field="clip_f16", kind="flag"),
    Key(name="allow-unsafe-template", group="run", field="allow_unsafe_template", kind="flag"),
    Key(name="modelfile", group="run", field="modelfile", kind="flag", decides=False),
    Key(name="threads", group="run", field="threads", kind="integer", minimum=1, maximum=256, decides=False),
    Key(name="memory", group="run", field="memory", parse=parse_size, decides=False),
    Key(name="device", group="run", field="device"),
    Key(name="junit", group="reports", field="junit", kind="file", decides=False),
    Key(name="summary", group="reports", field="summary", kind="file", decides=False),
    Key(name="html", group="reports", field="html", kind="file", decides=False),
    Key(name="bom", group="reports", field="bom", kind="file", decides=False),
)

_OF_OUTPUT = (
    Key(name=OUTPUT, group="output", field="destination", kind="file", of_output=True),
    Key(name=TYPE, group="output", field="types", repeated=True, of_output=True),
    Key(name="to", group="output", field="to", of_output=True),
    Key(name="dtype", group="options", field="dtype", of_output=True),
    Key(name="max-shard-size", group="options", field="max_shard_size", parse=parse_size, of_output=True),
    Key(name="allow-mismatch", group="options", field="allow_mismatch", kind="flag", of_output=True),
    Key(name="allow-requantize", group="options", field="allow_requantize", kind="flag", of_output=True),
)


def _of_group(group: str, options: type[Any]) -> Iterator[Key]:
    for option_field, info in option_fields(options):
        yield Key(
            name=info.flag.partition("/")[0].removeprefix("--"),
            group=group,
            field=option_field.name,
            kind=_kind(option_field, info),
            of_output=True,
            repeated=option_field.default == (),
            parse=info.parse,
            choices=info.choices,
            minimum=info.minimum,
            maximum=info.maximum,
        )


def _kind(option_field: dataclasses.Field[Any], info: OptionInfo) -> Kind:
    if info.parse is not None:
        return "text"
    kinds: tuple[tuple[str, Kind], ...] = (
        ("bool", "flag"), (Path.__name__, "file"), ("int", "integer"), ("float", "number")
    )  # fmt: skip
    declared = str(option_field.type).removesuffix(" | None")
    return next((kind for name, kind in kinds if declared == name), "text")


KEYS: Mapping[str, Key] = {
    key.name: key
    for key in (
        *_OF_SOURCE,
        *_OF_OUTPUT,
        *(key for group, options in OPTION_GROUPS.items() for key in _of_group(group, options)),
    )
}
"""Every key but ``outputs`` and ``runs``, by its name."""
