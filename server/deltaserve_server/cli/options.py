"""Options that several commands share, and the parsers of their values."""

import re
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_TARGET = "localhost:50051"
UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
UNITS |= {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


def parse_bytes(text: str) -> int:
    """Parses a number of bytes: `1048576`, `8GiB`, `8G`, `1.5 GB`.

    Raises:
        typer.BadParameter: The text is not a positive number of bytes.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip(), re.IGNORECASE)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise typer.BadParameter(f"expected a number of bytes, as 1073741824 or 8GiB, got {text!r}")
    return int(float(match[1]) * unit)


def parse_folder(text: str) -> Path:
    """Parses the name of a directory.

    Raises:
        typer.BadParameter: The text is empty, as an unset variable of a shell is.
    """
    if not text:
        raise typer.BadParameter("expected a directory, got ''")
    return Path(text)


def parse_address(text: str) -> str:
    """Checks an address, HOST:PORT or unix:PATH, and returns it.

    Raises:
        typer.BadParameter: The text is not an address.
    """
    from deltaserve._common.address import check_target

    try:
        check_target(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


TARGET_HELP = "Address of the server, or unix:PATH."
Target = Annotated[
    str,
    typer.Option("--target", metavar="HOST:PORT", envvar="DELTASERVE_TARGET", parser=parse_address, help=TARGET_HELP),
]
TargetArgument = Annotated[
    str,
    typer.Argument(metavar="HOST:PORT", envvar="DELTASERVE_TARGET", parser=parse_address, help=TARGET_HELP),
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model.", show_default=False)]
POLICY_HELP = "When a push becomes an update: sync:quorum=3, async:max_staleness=8, bounded:slack=2."
