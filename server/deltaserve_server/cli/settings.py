"""Policies and optimizers as text, for instance `sync:min_workers=4,quorum=3` and `adamw:lr=1e-3,weight_decay=0.01`.

Names, settings and their types come from the dataclasses of `deltaserve`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from types import NoneType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

import typer

if TYPE_CHECKING:
    from deltaserve import Async, Bounded, Optimizer, Sync

Policy: TypeAlias = "Sync | Async | Bounded"

T = TypeVar("T")

BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class Parsed(Generic[T]):
    """A parsed text.

    Attributes:
        name: The name before the colon.
        kind: The class that it names.
        settings: The settings in the text, by name.
    """

    name: str
    kind: type[T]
    settings: Mapping[str, Any]

    def make(self, **defaults: Any) -> T:
        """Returns the object; `defaults` replaces the defaults of settings that are not in the text."""
        return self.kind(**{**defaults, **self.settings})


def parse_policy(text: str) -> "Parsed[Policy]":
    """Parses a policy: `sync`, `async:max_staleness=8,damping=true`.

    Raises:
        typer.BadParameter: The text is not a policy. The server checks the ranges of the numbers.
    """
    from deltaserve import Async, Bounded, Sync
    from deltaserve.v1 import common_pb2

    kinds: dict[str, type[Policy]] = {"sync": Sync, "async": Async, "bounded": Bounded}  # the names of the protocol
    parsed = _parse(text, kinds, "a policy", example="sync:min_workers=4")
    for setting, value in parsed.settings.items():
        if isinstance(value, int):
            try:  # no server can check a number that does not fit into the message
                setattr(getattr(common_pb2.Policy(), parsed.name), setting, value)
            except ValueError:
                raise typer.BadParameter(f"{setting}: {value} is too large") from None
    return parsed


def parse_optimizer(text: str, optimizers: "Mapping[str, Optimizer]") -> "Optimizer":
    """Parses an optimizer: `adam`, `sgd:lr=0.05,momentum=0.9`.

    Args:
        text: The text.
        optimizers: The optimizers that it can name. Settings that are not in the text are those of the one it names.

    Raises:
        typer.BadParameter: The text is not an optimizer. The server checks the ranges of the numbers.
    """
    kinds = {name: type(optimizer) for name, optimizer in optimizers.items()}
    parsed = _parse(text, kinds, "an optimizer", example="adamw:lr=1e-3,weight_decay=0.01")
    return replace(optimizers[parsed.name], **parsed.settings)


def parse_settings(name: str, kind: type, text: str) -> dict[str, Any]:
    """Parses the settings of a class: `lr=0.05,momentum=0.9`.

    Args:
        name: The name of the class in errors.
        kind: A dataclass.
        text: The text.

    Raises:
        typer.BadParameter: A setting is none of the class, has no value or one of another type, or is there twice.
    """
    hints, settings = get_type_hints(kind), dict[str, Any]()
    names = [field.name for field in fields(kind) if field.init]
    for part in text.split(","):
        setting, equals, value = map(str.strip, part.partition("="))
        if setting not in names:
            raise typer.BadParameter(f"{name} has no setting {setting!r}; its settings are {', '.join(names)}")
        if not equals or setting in settings:
            raise typer.BadParameter(f"{setting}: expected {setting}=VALUE, once")
        settings[setting] = _parse_value(setting, value, hints[setting])
    return settings


def format_policy(policy: "Policy") -> str:
    """Returns a policy as text that `parse_policy` accepts, without settings that have their defaults."""
    return _format(type(policy).__name__.lower(), policy)


def format_optimizer(optimizer: "Optimizer") -> str:
    """Returns an optimizer as text for `parse_optimizer`, without settings that have the defaults of their kind."""
    return _format(optimizer.kind, optimizer)


def _parse(text: str, kinds: Mapping[str, type[T]], what: str, example: str) -> Parsed[T]:
    name, colon, settings = text.strip().partition(":")
    if name not in kinds:
        raise typer.BadParameter(f"expected {what}, {_or(kinds)}, as in {example}, got {name!r}")
    return Parsed(name, kinds[name], parse_settings(name, kinds[name], settings) if colon else {})


def _format(name: str, value: Any) -> str:
    values = {field: getattr(value, field.name) for field in fields(value) if field.init}
    settings = [f"{field.name}={_format_value(value)}" for field, value in values.items() if value != field.default]
    return f"{name}:{','.join(settings)}" if settings else name


def _parse_value(setting: str, text: str, hint: Any) -> Any:
    """Parses the value of a setting whose type is `hint`; an optional setting cannot be set to None."""
    value: Any
    kind = next(part for part in get_args(hint) if part is not NoneType) if NoneType in get_args(hint) else hint
    if get_origin(kind) is Literal:
        allowed, value = _or(get_args(kind)), text if text in get_args(kind) else None
    elif kind is bool:
        allowed, value = _or(BOOLEANS), BOOLEANS.get(text)
    elif kind is int:
        # int() also takes signs, blanks and underscores, and refuses thousands of digits with an error of its own.
        allowed, value = "a whole number", int(text) if re.fullmatch(r"\d{1,99}", text, re.ASCII) else None
    else:
        allowed, value = "a number", _number(text)
    if value is None:
        raise typer.BadParameter(f"{setting}: expected {allowed}, got {text!r}")
    return value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _format_value(value: Any) -> str:
    """Returns the value of a setting as text."""
    if isinstance(value, bool):
        return next(word for word, meaning in BOOLEANS.items() if meaning is value)
    # 2.0 reads better as 2; a large number would be printed with hundreds of digits.
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


def _or(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}"
