"""The documents: links resolve, every page can be reached, every error reason is explained, and examples run."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltaserve._common.error_table import TABLE
from deltaserve_server import LocalServer

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
RUNNABLE = [README, DOCS / "getting-started.md", DOCS / "numpy.md"]
TORCH = DOCS / "torch.md"  # torch alone takes seconds to import

LINK = re.compile(r"(?<!\\)\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
REASON_ROW = re.compile(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \| ([^|]+) \|", re.MULTILINE)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _prose(page: Path) -> str:
    return CODE_BLOCK.sub("", page.read_text())


def _links(page: Path) -> Iterator[tuple[Path, str]]:
    """Yields the target and the fragment of each relative link."""
    for link in LINK.findall(_prose(page)):
        if not re.match(r"[a-z]+:", link):
            path, _, fragment = link.partition("#")
            yield ((page.parent / path).resolve() if path else page), fragment


def _anchors(page: Path) -> set[str]:
    """Returns the fragments that GitHub makes from a page's headings."""
    headings = HEADING.findall(_prose(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_relative_links_resolve(page: Path) -> None:
    for target, fragment in _links(page):
        assert target.exists(), f"{_name(page)} links to {target}, which does not exist"
        if fragment:
            assert fragment in _anchors(target), f"{_name(page)}: {_name(target)} has no heading #{fragment}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, new = {README}, [README]
    while new:
        for target, _ in _links(new.pop()):
            pages = sorted(target.glob("*.md")) if target.is_dir() else [target]
            found = [page for page in pages if page.suffix == ".md" and page not in reached]
            reached.update(found)
            new += found
    assert set(PAGES) - reached == set()


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_the_rows_of_a_table_have_as_many_cells_as_its_head(page: Path) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", _prose(page), re.MULTILINE):
        counts = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
        assert len(set(counts)) == 1, f"{_name(page)}: a table that begins {table[:60]!r}"


def test_every_error_reason_is_explained() -> None:
    rows = {reason: (code, exceptions) for reason, code, exceptions in REASON_ROW.findall(_troubleshooting())}
    assert rows.keys() == TABLE.keys()
    for reason, row in TABLE.items():
        code, exceptions = rows[reason]
        assert code == row.code.name, reason
        assert f"`{row.exception.__name__}`" in exceptions, reason


def _troubleshooting() -> str:
    return (DOCS / "troubleshooting.md").read_text()


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with LocalServer() as server:
        yield server.target


@pytest.mark.parametrize("page", [*RUNNABLE, pytest.param(TORCH, marks=pytest.mark.deep)], ids=_name)
def test_examples_run(page: Path, target: str) -> None:
    """The Python blocks of a page run in order, in one namespace, against a real server."""
    blocks = PYTHON_BLOCK.findall(page.read_text())
    assert blocks
    names: dict[str, object] = {"__name__": "documents"}
    for number, block in enumerate(blocks, 1):
        code = block.replace('"localhost:50051"', f'"{target}"')
        exec(compile(code, f"{_name(page)}, block {number}", "exec"), names)


# --- docs/architecture.md names files and functions that exist


def test_the_architecture_page_names_what_exists() -> None:
    """Every file in backticks exists, and every name after it is in that file."""
    sources = "\n".join(path.read_text() for room in ("client", "server") for path in (ROOT / room).rglob("*.py"))
    for path, names in re.findall(r"`([\w/]+\.(?:py|proto))`((?:[:,]? `[\w.]+(?:\(\))?`)*)", _architecture()):
        found = [file for file in ROOT.glob(f"**/{path}") if ".venv" not in file.parts]
        assert found, f"docs/architecture.md names {path}, which does not exist"
        for name in re.findall(r"`([\w.]+)(?:\(\))?`", names):
            part = name.rpartition(".")[2]
            assert re.search(rf"\b(def|class|rpc|message) {part}\b", "".join(f.read_text() for f in found)) or (
                re.search(rf"\b(def|class) {part}\b", sources)
            ), f"docs/architecture.md: {path} has no {name}"


def _architecture() -> str:
    return (DOCS / "architecture.md").read_text()
