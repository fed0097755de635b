"""Writes the results of a run into docs/performance.md, between the marks in its text."""

import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks import scaling, targets
from benchmarks.results import Results

FILE = Path("docs/performance.md")


def fill(file: Path, machine: Mapping[str, str], results: Results) -> None:
    """Replaces everything between `<!-- NAME -->` and `<!-- end of NAME -->`.

    Args:
        file: The document.
        machine: Description of the machine.
        results: Results of the run.

    Raises:
        ValueError: A mark is missing.
    """
    parts = {
        "machine": ", ".join(f"{name} {value}" for name, value in machine.items()) + ".",
        "targets": targets.table(results),
        "tables": "\n\n".join(f"### {result.title}\n\n{result.markdown()}" for result in results.values()),
        "scaling": scaling.report(results),
    }
    text = file.read_text()
    for name, part in parts.items():
        marks = re.compile(f"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
        text, count = marks.subn(lambda _, part=part: f"{part}\n", text)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{file}: expected one part named {name}, found {count}")
    file.write_text(text)
