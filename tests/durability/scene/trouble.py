"""Faulty disks: files that fail on demand, a small file system to fill, and crashes at an operation."""

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
    """The operations that a disk refuses.

    Attributes:
        errors: The errno by operation, such as "write" or "sync".
        only: Part of the names of the files concerned.
        gate: Writes wait until it is set.
        waiting: Set when a write waits.
    """

    def __init__(self) -> None:
        self.errors: dict[str, int] = {}
        self.only = ""
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()

    def may(self, what: str, name: str) -> None:
        """Raises OSError if the operation is refused."""
        if what == "write" and self.only in name and not self.gate.is_set():
            self.waiting.set()
            self.gate.wait(20)
        number = self.errors.get(what)
        if number and self.only in name:
            raise OSError(number, os.strerror(number), name)

    def lift(self) -> None:
        """Ends all refusals."""
        self.errors.clear()
        self.gate.set()

    def files(self, folder: Path) -> Files:
        """Returns a folder on this disk; folders called "copy" are on a good one."""
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
        self.name = path.name
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
    """Mounts a small file system; yields None if that is not permitted."""
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
    """Fills a file system; returns the file that takes the space."""
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
    """The process is killed."""


@contextmanager
def crashing(at: int) -> Iterator[None]:
    """Kills the process before its operation number `at` on a folder."""
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
