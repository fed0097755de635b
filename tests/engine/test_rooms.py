"""Which rooms of the server may know which."""

import ast
from pathlib import Path

import pytest

import deltaserve_server

ROOT = Path(deltaserve_server.__file__).parent

FORBIDDEN = ("grpc", "grpc_health", "grpc_reflection", "google", "deltaserve.v1", "deltaserve_server.service")


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", ["optimizers", "model", "memory", "durability", "engine"])
def test_a_room_behind_the_service_knows_neither_grpc_nor_protobuf(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        for name in _imported(path):
            assert not any(name == one or name.startswith(f"{one}.") for one in FORBIDDEN), f"{path.name}: {name}"


@pytest.mark.parametrize("room", ["optimizers", "model", "memory", "durability"])
def test_a_room_behind_the_engine_does_not_know_it(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        assert not any(name.startswith("deltaserve_server.engine") for name in _imported(path)), path.name
