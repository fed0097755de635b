"""What an optimizer takes: the files that know one by its name."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

from deltaserve._common.optimizers import OPTIMIZERS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "client" / "deltaserve", ROOT / "server" / "deltaserve_server"]
PROTO = ROOT / "proto" / "deltaserve" / "v1"

REFERENCE = "server/deltaserve_server/optimizers/reference.py"
MESSAGE = "proto/deltaserve/v1/optimizers.proto"
TABLE = "client/deltaserve/_common/optimizers/__init__.py"
PUBLIC_NAMES = "client/deltaserve/__init__.py"

BESIDES = ("client/deltaserve/torch/", "server/deltaserve_server/recipes/")
"""What may know an optimizer, but does not need to: the drop-in for a class of torch, and settings of training runs."""


def _names(path: Path) -> set[str]:
    """Returns the identifiers and the strings of a Python file; its docstrings are other strings."""
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.NAME:
            found.add(token.string)
        elif token.type == tokenize.STRING and not token.string.lower().startswith(("f", "rf")):
            value = ast.literal_eval(token.string)
            if isinstance(value, str):
                found.add(value)
    return found


@pytest.fixture(scope="module")
def names() -> dict[str, set[str]]:
    """The names in each source file that somebody has written; generated stubs are left out."""
    files = [path for folder in SOURCES for path in folder.rglob("*.py") if not path.stem.endswith("_pb2")]
    return {path.relative_to(ROOT).as_posix(): _names(path) for path in files}


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind != "adadelta"])  # the default is in signatures
def test_adding_an_optimizer_touches_its_definition_its_reference_its_message_and_the_table(
    kind: str, names: dict[str, set[str]]
) -> None:
    name = OPTIMIZERS[kind].__name__
    definition = OPTIMIZERS[kind].__module__.rpartition(".")[2]
    touched = {path for path, found in names.items() if {kind, name} & found and not path.startswith(BESIDES)}
    touched |= {
        path.relative_to(ROOT).as_posix() for path in PROTO.glob("*.proto") if f" {kind} = " in path.read_text()
    }
    assert touched == {
        f"client/deltaserve/_common/optimizers/{definition}.py",
        REFERENCE,
        MESSAGE,
        TABLE,
        PUBLIC_NAMES,
    }
