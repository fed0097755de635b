"""A policy as text, as `sync:min_workers=4,quorum=3`: how it is given, and how it is shown.

Names, settings and their types are those of the dataclasses in `deltaserve`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import typer

if TYPE_CHECKING:
    from deltaserve import Async, Bounded, Sync

TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class PolicyText:
    """A policy as it was written.

    Attributes:
        kind: Its class in `deltaserve`.
        settings: What was written with it, by name.
    """

    kind: "type[Sync | Async | Bounded]"
    settings: Mapping[str, Any]

    def policy(self, **unless_written: Any) -> "Sync | Async | Bounded":
        """Returns the policy, with these settings where nothing was written."""
        return self.kind(**{**unless_written, **self.settings})


def parse_policy(text: str) -> PolicyText:
    """Reads a policy: `sync`, `async:max_staleness=8,damping=true`.

    Raises:
        typer.BadParameter: It is none. Whether its numbers are in range is the server's to say.
    """
    name, colon, written = text.strip().partition(":")
    kinds = _kinds()
    if name not in kinds:
        raise typer.BadParameter(f"{name!r} is no policy; write {_or(kinds)}, as in sync:min_workers=4")
    types, settings = get_type_hints(kinds[name]), dict[str, Any]()
    for part in written.split(",") if colon else ():
        setting, equals, value = map(str.strip, part.partition("="))
        if setting not in types:
            raise typer.BadParameter(f"{name} has no setting {setting!r}; it has {', '.join(types)}")
        if not equals or setting in settings:
            raise typer.BadParameter(f"{setting}: expected {setting}=VALUE, once")
        settings[setting] = _read(setting, value, types[setting])
        _check_size(kinds[name](**{setting: settings[setting]}), setting, value)
    return PolicyText(kinds[name], settings)


def format_policy(policy: "Sync | Async | Bounded") -> str:
    """Returns a policy as it can be written, without the settings that have their defaults."""
    held = {field.name: getattr(policy, field.name) for field in fields(policy)}
    settings = [
        f"{field.name}={_word(held[field.name])}" for field in fields(policy) if held[field.name] != field.default
    ]
    name = type(policy).__name__.lower()
    return f"{name}:{','.join(settings)}" if settings else name


def _kinds() -> "dict[str, type[Sync | Async | Bounded]]":
    """Returns the classes by the names that the protocol has for them."""
    from deltaserve._types import Policy

    return {kind.__name__.lower(): kind for kind in get_args(Policy)}


def _read(setting: str, text: str, hint: Any) -> Any:
    """Returns what a text means as a value of a type; None, where the type has it, cannot be written."""
    value: Any
    kind = next(part for part in get_args(hint) if part is not NoneType) if NoneType in get_args(hint) else hint
    if get_origin(kind) is Literal:
        allowed, value = _or(get_args(kind)), text if text in get_args(kind) else None
    elif kind is bool:
        allowed, value = _or(TRUTH), TRUTH.get(text)
    elif kind is int:
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


def _check_size(policy: "Sync | Async | Bounded", setting: str, text: str) -> None:
    """Raises typer.BadParameter for a number that no message holds, so that the server cannot refuse it."""
    from deltaserve._types import from_policy

    try:
        from_policy(policy)
    except ValueError:
        raise typer.BadParameter(f"{setting}: {text} is too large") from None


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return next(word for word, meaning in TRUTH.items() if meaning is value)
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


def _or(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}"
