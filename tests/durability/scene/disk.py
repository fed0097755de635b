"""A simulated disk: it records operations and produces states that a crash may leave.

Unsynced data may be lost sector by sector, and a file may have its old or new length. Unsynced changes of names may be
lost, the later ones or any. After a failed fsync, what was written before it stays unknown for good (Rebello et al.,
ATC'20).
"""

import copy
import errno
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PosixPath
from typing import Any, ClassVar, NamedTuple

from deltaserve_server.durability.files import File, Files

SECTOR = 512


class Op(NamedTuple):
    """An operation."""

    kind: str
    place: str = ""
    name: str = ""
    file: int = 0
    offset: int = 0
    data: bytes = b""


@dataclass
class Inode:
    """A file: its durable content, and its content in the page cache."""

    durable: bytearray = field(default_factory=bytearray)
    now: bytearray = field(default_factory=bytearray)
    touched: set[int] = field(default_factory=set)
    limbo: set[int] = field(default_factory=set)

    def allocate(self, stop: int) -> None:
        self.now.extend(bytes(max(stop - len(self.now), 0)))

    def write(self, offset: int, data: bytes) -> None:
        self.allocate(offset + len(data))
        self.now[offset : offset + len(data)] = data
        self.touched |= set(range(offset // SECTOR, -(-(offset + len(data)) // SECTOR)))

    def cut(self, stop: int) -> None:
        del self.now[stop:]

    def sync(self) -> None:
        """Pages of a failed fsync are not written again: the kernel has marked them clean."""
        kept = {at: bytes(self.durable[at * SECTOR : (at + 1) * SECTOR]) for at in self.limbo - self.touched}
        self.durable = bytearray(self.now)
        for at, old in kept.items():
            self._put(self.durable, at, old)
        self.touched, self.limbo = set(), self.limbo - self.touched

    def fail(self) -> None:
        self.limbo |= self.touched
        self.touched = set()

    def crash(self, chance: random.Random, share: float) -> bytes:
        """Returns the content after a crash that keeps about a `share` of the unsynced data."""
        long = chance.random() < max(share, 0.5 * (0 < share < 1))
        left = bytearray(self.durable)
        if long:
            del left[len(self.now) :]
            left.extend(bytes(len(self.now) - len(left)))
        for at in self.touched | self.limbo:
            if chance.random() < share:
                self._put(left, at, bytes(self.now[at * SECTOR : (at + 1) * SECTOR]))
        return bytes(left)

    @staticmethod
    def _put(content: bytearray, at: int, sector: bytes) -> None:
        room = content[at * SECTOR : (at + 1) * SECTOR]
        part = sector[: len(room)].ljust(len(room), b"\0")
        content[at * SECTOR : at * SECTOR + len(room)] = part


@dataclass
class Directory:
    """A folder: its durable names, and the changes since."""

    durable: dict[str, Any] = field(default_factory=dict)
    done: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def now(self) -> dict[str, Any]:
        return self._after(self.done)

    def set(self, *changes: tuple[str, Any]) -> None:
        """Sets names, or removes those that are None, in one step."""
        self.done.append(("", changes))

    def sync(self) -> None:
        self.durable, self.done = self.now, []

    def crash(self, chance: random.Random, share: float) -> dict[str, Any]:
        if share in (0, 1):
            kept = self.done if share else []
        elif chance.random() < 0.5:
            kept = self.done[: chance.randrange(len(self.done) + 1)]
        else:
            kept = [change for change in self.done if chance.random() < share]
        return self._after(kept)

    def _after(self, done: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(self.durable)
        for _, changes in done:
            for name, node in changes:
                if node is None:
                    names.pop(name, None)
                else:
                    names[name] = node
        return names


class Disk:
    """Applies recorded operations and produces states that a crash may leave.

    Args:
        root: Folder above all recorded ones; its present content is durable.
        empty: Whether to start with an empty folder instead.
    """

    def __init__(self, root: Path, *, empty: bool = False) -> None:
        self.root = str(root)
        self.top = Directory() if empty else self._load(root)
        self.files: dict[int, Inode] = {}

    def moved(self, root: Path) -> "Disk":
        """Returns a copy of this disk, with its unsynced data, for operations in another folder."""
        other = copy.deepcopy(self)
        other.root = str(root)
        return other

    def _load(self, path: Path) -> Directory:
        names: dict[str, Any] = {}
        for found in path.iterdir():
            if found.is_dir():
                names[found.name] = self._load(found)
            else:
                content = found.read_bytes()
                names[found.name] = Inode(bytearray(content), bytearray(content))
        return Directory(names)

    def do(self, op: Op) -> None:
        if op.kind == "create":
            self.files[op.file] = Inode()
        if op.place:
            self._to_folder(op, self._at(op.place))
        else:
            self._to_file(op, self.files[op.file])

    def _to_folder(self, op: Op, folder: Directory) -> None:
        match op.kind:
            case "create":
                folder.set((op.name, self.files[op.file]))
            case "mkdir":
                folder.set((op.name, Directory()))
            case "rename":
                folder.set((op.data.decode(), folder.now[op.name]), (op.name, None))
            case "remove":
                folder.set((op.name, None))
            case "sync folder":
                folder.sync()
            case "shorten":
                inode = folder.now[op.name]
                inode.write(op.offset, op.data)
                inode.cut(op.offset + len(op.data))
                if op.file:
                    inode.sync()
            case "rewrite":
                inode = folder.now[op.name]
                if op.data:
                    inode.write(op.offset, op.data)
                inode.sync()

    def _to_file(self, op: Op, inode: Inode) -> None:
        match op.kind:
            case "allocate":
                inode.allocate(op.offset)
            case "write":
                inode.write(op.offset, op.data)
            case "cut":
                inode.cut(op.offset)
            case "sync":
                inode.sync()
            case "sync failed":
                inode.fail()

    def leave(self, target: Path, chance: random.Random, share: float) -> Path:
        """Writes a state that a crash may leave; a `share` of 1 is the page cache, as if only the process died."""
        self._leave(self.top, target, chance, share)
        return target

    def _leave(self, held: Directory, path: Path, chance: random.Random, share: float) -> None:
        path.mkdir()
        for name, node in held.crash(chance, share).items():
            if isinstance(node, Directory):
                self._leave(node, path / name, chance, share)
            else:
                (path / name).write_bytes(node.crash(chance, share))

    def _at(self, place: str) -> Directory:
        held = self.top
        for part in Path(place).relative_to(self.root).parts:
            held = held.now[part]
        return held


class Recorder:
    """Records the operations on a data directory.

    Attributes:
        log: The operations, with notes between them.
        fails: Returns the errno with which an operation fails, or None.
    """

    current: "ClassVar[Recorder | None]" = None

    def __init__(self) -> None:
        self.log: list[Op | Any] = []
        self.fails: Callable[[Op], int | None] = lambda _: None
        self._files = 0

    def add(self, op: Op) -> None:
        self.log.append(op)

    def may(self, op: Op) -> None:
        """Raises OSError if the operation must fail."""
        number = self.fails(op)
        if number:
            if op.kind == "sync":
                self.add(op._replace(kind="sync failed"))
            raise OSError(number, os.strerror(number))

    def next_file(self) -> int:
        self._files += 1
        return self._files


class RecordedFile(File):
    """A real file whose operations are recorded."""

    def __init__(self, path: Path, recorder: Recorder) -> None:
        self.name = path.name
        self._recorder = recorder
        self._number = recorder.next_file()
        op = Op("create", str(path.parent), path.name, self._number)
        recorder.may(op)
        super().__init__(path)
        recorder.add(op)

    def allocate(self, start: int, stop: int) -> None:
        self._do(
            Op("allocate", name=self.name, file=self._number, offset=stop),
            lambda: super(RecordedFile, self).allocate(start, stop),
        )

    def write(self, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
        data = b"".join(buffers)
        self._do(
            Op("write", name=self.name, file=self._number, offset=offset, data=data),
            lambda: super(RecordedFile, self).write(offset, buffers),
        )

    def cut(self, stop: int) -> None:
        self._do(Op("cut", name=self.name, file=self._number, offset=stop), lambda: super(RecordedFile, self).cut(stop))

    def sync(self) -> None:
        self._do(Op("sync", name=self.name, file=self._number), super().sync)

    def _do(self, op: Op, really: Callable[[], None]) -> None:
        self._recorder.may(op)
        really()
        self._recorder.add(op)


class RecordedFiles(Files):
    """A real folder whose operations are recorded."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        assert Recorder.current
        self._recorder = Recorder.current

    def create(self, name: str) -> File:
        return RecordedFile(self.folder / name, self._recorder)

    def shorten(self, name: str, stop: int, end: bytes, *, sync: bool) -> None:
        self._do(
            Op("shorten", str(self.folder), name, sync, stop, end),
            lambda: super(RecordedFiles, self).shorten(name, stop, end, sync=sync),
        )

    def rewrite(self, name: str, offset: int, data: memoryview) -> None:
        self._do(
            Op("rewrite", str(self.folder), name, offset=offset, data=bytes(data)),
            lambda: super(RecordedFiles, self).rewrite(name, offset, data),
        )

    def rename(self, name: str, new: str) -> None:
        self._do(
            Op("rename", str(self.folder), name, data=new.encode()),
            lambda: super(RecordedFiles, self).rename(name, new),
        )

    def remove(self, name: str) -> None:
        if (self.folder / name).exists():
            self._do(Op("remove", str(self.folder), name), lambda: super(RecordedFiles, self).remove(name))

    def sync(self) -> None:
        self._do(Op("sync folder", str(self.folder)), super().sync)

    def _do(self, op: Op, really: Callable[[], None]) -> None:
        self._recorder.may(op)
        really()
        self._recorder.add(op)


class RecordedPath(PosixPath):
    """A path whose mkdir and rename are recorded."""

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        there = self.exists()
        if parents and not self.parent.exists():
            self.parent.mkdir(mode, parents)
        super().mkdir(mode, False, exist_ok)
        if Recorder.current and not there:
            Recorder.current.add(Op("mkdir", str(self.parent), self.name))

    def rename(self, target: Any) -> Any:
        made = super().rename(target)
        if Recorder.current:
            Recorder.current.add(Op("rename", str(self.parent), self.name, data=Path(target).name.encode()))
        return made


NO_SPACE, BROKEN = errno.ENOSPC, errno.EIO
