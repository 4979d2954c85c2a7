"""Options that several commands share, as one dataclass instead of a list spelled out in each of them.

A parameter annotated with a dataclass is expanded into the dataclass's fields when the command is registered, and
collected into an instance of it when the command runs. A field is either annotated with a Typer option of its own, or
an option of ``gemma2tool.formats.options``, which describes it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from gemma2tool.formats.option_info import OptionInfo, option_fields

Command = Callable[..., None]


def expanded(command: Command) -> Command:
    """``command`` with the fields of each dataclass among its parameters in place of that parameter,
    as Typer expects.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            groups[name] = hints[name]
            parameters += _parameters(name, hints[name])
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**kwargs: Any) -> None:
        for name, group in groups.items():
            given = {field.name: kwargs.pop(_name(name, field)) for field in _fields(group)}
            kwargs[name] = group(**_parsed(group, given))
        command(**kwargs)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # functions have no such field
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _fields(group: type) -> typing.Sequence[dataclasses.Field[Any]]:
    """The fields that are options; typed options have others, which the pipeline sets."""
    fields = dataclasses.fields(group)
    return [field for field in fields if "option" in field.metadata] or fields


def _name(parameter: str, field: dataclasses.Field[Any]) -> str:
    """The name that Typer knows a field by: typed options of different groups may have fields of one name."""
    return f"{parameter}_{field.name}" if "option" in field.metadata else field.name


def _parameters(parameter: str, group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    infos = {field.name: info for field, info in option_fields(group)}
    parameters = []
    for field in _fields(group):
        annotation, default = hints[field.name], field.default
        if field.name in infos:
            annotation = _typer_option(annotation, infos[field.name], getattr(group, "HEADING", None))
            default = default if default != () else None
        parameters.append(
            inspect.Parameter(
                _name(parameter, field), inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
        )
    return parameters


def _typer_option(hint: Any, info: OptionInfo, heading: str | None) -> Any:
    """The option as Typer takes it: sequences as lists of strings, parsed values as strings. Its help need not say what
    its heading says.
    """
    repeated = typing.get_origin(hint) is tuple
    kind = str if repeated or info.parse else hint
    if isinstance(kind, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    optional = hint is not bool
    kind = list[str] if repeated else kind
    return Annotated[
        kind | None if optional else kind,
        typer.Option(
            info.flag,
            help=info.help_below(heading),
            rich_help_panel=heading,
            metavar=info.metavar,
            min=info.minimum,
            max=info.maximum,
            autocompletion=completion(info.choices) if info.choices else None,
        ),
    ]


def _parsed(group: type, given: dict[str, Any]) -> dict[str, Any]:
    """Typer's values as the dataclass takes them."""
    values = dict(given)
    for field, info in option_fields(group):
        value = values[field.name]
        if field.default == ():
            values[field.name] = tuple(info.parse(text) if info.parse else text for text in value or ())
        elif info.parse and value is not None:
            values[field.name] = info.parse(value)
    return values


def completion(values: Callable[[], typing.Iterable[str]] | typing.Iterable[str]) -> Callable[[str], list[str]]:
    """What shell completion offers: the values that begin with what has been typed; after a comma, the next one."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        names = values() if callable(values) else values
        return [f"{before}{comma}{name}" for name in names if name.startswith(last)]

    return complete
