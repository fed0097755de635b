"""Options that several commands share, and how their values are read."""

import re
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_TARGET = "localhost:50051"
UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
UNITS |= {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


def parse_bytes(text: str) -> int:
    """Reads a number of bytes: `1048576`, `8GiB`, `8G`, `1.5 GB`.

    Raises:
        typer.BadParameter: it is no such number, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip(), re.IGNORECASE)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise typer.BadParameter(f"{text!r} is no number of bytes; write 1073741824 or 8GiB")
    return int(float(match[1]) * unit)


def parse_folder(text: str) -> Path:
    """Reads a folder's name.

    Raises:
        typer.BadParameter: it is empty, as an unset variable of a shell is.
    """
    if not text:
        raise typer.BadParameter("'' is no folder")
    return Path(text)


def parse_address(text: str) -> str:
    """Checks an address, HOST:PORT or unix:PATH.

    Raises:
        typer.BadParameter: it is no such thing.
    """
    from deltaserve._connection import check_target

    try:
        check_target(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


TARGET_HELP = "The server."
Target = Annotated[
    str,
    typer.Option("--target", metavar="HOST:PORT", envvar="DELTASERVE_TARGET", parser=parse_address, help=TARGET_HELP),
]
TargetArgument = Annotated[
    str,
    typer.Argument(metavar="HOST:PORT", envvar="DELTASERVE_TARGET", parser=parse_address, help=TARGET_HELP),
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="The model's name.", show_default=False)]
POLICY_HELP = "When a push becomes an update, as sync:quorum=3, async:max_staleness=8 or bounded:slack=2."
