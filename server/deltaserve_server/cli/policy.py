"""Policies as text, for instance `sync:min_workers=4,quorum=3`.

Names, settings and their types come from the dataclasses `deltaserve.Sync`, `Async` and `Bounded`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

import typer

if TYPE_CHECKING:
    from deltaserve import Async, Bounded, Sync

Policy: TypeAlias = "Sync | Async | Bounded"

BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class PolicyText:
    """A parsed policy.

    Attributes:
        kind: The policy's class in `deltaserve`.
        settings: The settings in the text, by name.
    """

    kind: "type[Policy]"
    settings: Mapping[str, Any]

    def policy(self, **defaults: Any) -> "Policy":
        """Returns the policy; `defaults` replaces the defaults of settings that are not in the text."""
        return self.kind(**{**defaults, **self.settings})


def parse_policy(text: str) -> PolicyText:
    """Parses a policy: `sync`, `async:max_staleness=8,damping=true`.

    Raises:
        typer.BadParameter: The text is not a policy. The server checks the ranges of the numbers.
    """
    name, colon, settings_text = text.strip().partition(":")
    from deltaserve import Async, Bounded, Sync
    from deltaserve.v1 import common_pb2

    kinds: dict[str, type[Policy]] = {"sync": Sync, "async": Async, "bounded": Bounded}  # the names of the protocol
    if name not in kinds:
        raise typer.BadParameter(f"expected a policy, {_or(kinds)}, as in sync:min_workers=4, got {name!r}")
    types, settings = get_type_hints(kinds[name]), dict[str, Any]()
    for part in settings_text.split(",") if colon else ():
        setting, equals, value = map(str.strip, part.partition("="))
        if setting not in types:
            raise typer.BadParameter(f"{name} has no setting {setting!r}; its settings are {', '.join(types)}")
        if not equals or setting in settings:
            raise typer.BadParameter(f"{setting}: expected {setting}=VALUE, once")
        settings[setting] = parsed = _parse_value(setting, value, types[setting])
        if isinstance(parsed, int):
            try:  # no server can check a number that does not fit into the message
                setattr(getattr(common_pb2.Policy(), name), setting, parsed)
            except ValueError:
                raise typer.BadParameter(f"{setting}: {parsed} is too large") from None
    return PolicyText(kinds[name], settings)


def format_policy(policy: "Policy") -> str:
    """Returns a policy as text that `parse_policy` accepts, without settings that have their defaults."""
    values = {field: getattr(policy, field.name) for field in fields(policy)}
    settings = [f"{field.name}={_format_value(value)}" for field, value in values.items() if value != field.default]
    name = type(policy).__name__.lower()
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
    if isinstance(value, bool):
        return next(word for word, meaning in BOOLEANS.items() if meaning is value)
    # 2.0 reads better as 2; a large number would be printed with hundreds of digits.
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


def _or(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}"
