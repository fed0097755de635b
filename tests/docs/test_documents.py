"""The documents: links resolve, every page can be reached, every error reason is explained, and examples run."""

import ast
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
TORCH = [DOCS / "torch.md", DOCS / "optimizers.md"]  # torch alone takes seconds to import

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


@pytest.mark.parametrize(
    "page", [*RUNNABLE, *(pytest.param(page, marks=pytest.mark.deep) for page in TORCH)], ids=_name
)
def test_examples_run(page: Path, target: str) -> None:
    """The Python blocks of a page run in order, in one namespace, against a real server."""
    blocks = PYTHON_BLOCK.findall(page.read_text())
    assert blocks
    names: dict[str, object] = {"__name__": "documents"}
    for number, block in enumerate(blocks, 1):
        code = block.replace('"localhost:50051"', f'"{target}"')
        exec(compile(code, f"{_name(page)}, block {number}", "exec"), names)


# --- docs/architecture.md names what exists

SOURCES = [ROOT / "client" / "deltaserve", ROOT / "server" / "deltaserve_server"]


def _architecture_names() -> list[str]:
    return re.findall(r"`([^`\n]+)`", (DOCS / "architecture.md").read_text())


def test_the_files_and_folders_of_the_architecture_page_exist() -> None:
    paths = [name for name in _architecture_names() if re.fullmatch(r"[\w/]+(\.py|/)", name)]
    assert paths
    for path in paths:
        assert any((folder / path).exists() for folder in (ROOT, *SOURCES)), f"docs/architecture.md names {path}"


def test_the_classes_and_functions_of_the_architecture_page_exist() -> None:
    """`Class.method` is a method of that class or of one of its bases."""
    functions: set[str] = set()
    methods: dict[str, set[str]] = {}
    for path in (path for folder in SOURCES for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                functions.add(node.name)
            elif isinstance(node, ast.ClassDef):
                own = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                bases = {f"{base.id}." for base in node.bases if isinstance(base, ast.Name)}
                methods.setdefault(node.name, set()).update(own, bases)
    rooms = {folder.name for source in SOURCES for folder in source.iterdir()}

    def has(owner: str, method: str) -> bool:
        known = methods.get(owner, set())
        return method in known or any(has(base.removesuffix("."), method) for base in known if base.endswith("."))

    for name in _architecture_names():
        owner, _, method = name.rpartition(".")
        if not re.fullmatch(r"\w+(\.\w+)?", name) or name in rooms or owner == "deltaserve":
            continue
        exists = has(owner, method) if owner else name in functions or name in methods
        assert exists, f"docs/architecture.md names {name}"
