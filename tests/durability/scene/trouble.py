"""A disk that gives trouble: files that refuse what a test says, and a small file system that can be full."""

import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from deltaserve_server.durability.files import File, Files


class Trouble:
    """What a disk refuses at present.

    Attributes:
        errors: By what is asked for, as "write" or "sync", the errno that it gets.
        only: A part of the names of the files that this is about.
        gate: Whoever writes waits for it.
        waiting: Is set when somebody does.
    """

    def __init__(self) -> None:
        self.errors: dict[str, int] = {}
        self.only = ""
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()

    def may(self, what: str, name: str) -> None:
        """Raises OSError where that is refused."""
        if what == "write" and self.only in name and not self.gate.is_set():
            self.waiting.set()
            self.gate.wait(20)
        number = self.errors.get(what)
        if number and self.only in name:
            raise OSError(number, os.strerror(number), name)

    def lift(self) -> None:
        """Refuses nothing any more."""
        self.errors.clear()
        self.gate.set()

    def files(self, folder: Path) -> Files:
        """Returns a folder on this disk; copies of a data directory are on a good one."""
        return Files(folder) if "copy" in folder.parts else _Files(folder, self)


class _Files(Files):
    def __init__(self, folder: Path, trouble: Trouble) -> None:
        super().__init__(folder)
        self._trouble = trouble

    def create(self, name: str) -> File:
        self._trouble.may("create", name)
        return _File(self.folder / name, self._trouble)

    def rename(self, name: str, new: str) -> None:
        self._trouble.may("rename", new)
        super().rename(name, new)

    def sync(self) -> None:
        self._trouble.may("sync folder", self.folder.name)
        super().sync()


class _File(File):
    def __init__(self, path: Path, trouble: Trouble) -> None:
        super().__init__(path)
        self._trouble = trouble

    def allocate(self, start: int, stop: int) -> None:
        self._trouble.may("allocate", self.name)
        super().allocate(start, stop)

    def write(self, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
        self._trouble.may("write", self.name)
        super().write(offset, buffers)

    def sync(self) -> None:
        self._trouble.may("sync", self.name)
        super().sync()


@contextmanager
def small_file_system(place: Path, size: str = "6m") -> Iterator[Path | None]:
    """Mounts a small file system; gives None where that is not allowed."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield place if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> Path:
    """Leaves no room at all; returns the file that takes it."""
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return ballast


class Crash(BaseException):
    """The process dies."""


@contextmanager
def crashing(at: int) -> Iterator[None]:
    """Has the process die before the operation on a folder that has this number."""
    numbers = count()

    def dying(really: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if next(numbers) == at:
                raise Crash
            return really(*given, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("create", "shorten", "rename", "remove", "sync"):
            patch.setattr(Files, name, dying(getattr(Files, name)))
        yield
