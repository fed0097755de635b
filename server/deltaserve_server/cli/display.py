"""Formats numbers and tables. Nothing is truncated to the width of the terminal, because output may be piped."""

from collections.abc import Sequence


def format_bytes(count: float) -> str:
    """Formats a number of bytes with a suitable unit: `37.5 KiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """Formats a duration in its two largest units: `3 min 2 s`."""
    whole = int(seconds)
    for size, large, small_size, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {large} {whole % size // small_size} {small}"
    return f"{whole} s"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Formats rows as columns, each as wide as its widest cell; numbers are right-aligned."""
    cells = [list(header), *([str(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    numeric = [all(isinstance(row[column], int | float) for row in rows) for column in range(len(header))]
    pads = [str.rjust if right and rows else str.ljust for right in numeric]  # `all` of no rows is true
    # Spaces at the end of a line would make narrow terminals wrap it.
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)).rstrip()
        for row in cells
    )


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Formats each pair as a line, the second parts aligned."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in pairs)
