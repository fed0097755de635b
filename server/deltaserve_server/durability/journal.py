"""A journal: a model's records one after the other in a file.

The file begins with a title of 64 bytes. Every record begins at a multiple of 64 bytes: a head of 48, JSON, the vector
at the next such multiple, and a tail of 16 that ends at one. What follows the last record is zeros, 64 at the least.
Head and tail hold the file's own number of chance, so that no vector can pass for a record.

A crash may tear what was being written and nobody was told of: a part of it is zeros, as the file was before. So it
ends there. Anything else that is not as it was written was changed later, and is an error; as is a record that is not
there where a later one says that it was safe, or where the file ends without those zeros: it was longer once. A loss of
power alone may make it shorter.
"""

import errno
import logging
import secrets
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from crc32c import crc32c

from deltaserve._common.failpoints import failpoint
from deltaserve_server.durability.checked import decoded
from deltaserve_server.durability.errors import CorruptError, readable
from deltaserve_server.durability.files import Files
from deltaserve_server.durability.records import DTYPES, Header, Piece, Record, finite

_log = logging.getLogger(__name__)

_LINE = 64
_PART = 4 << 20
"""Bytes that are read at a time."""

_SECTOR = 512
"""What a disk writes whole or not at all."""

_MAGIC = b"deltaserve journal 1\n"
_TITLE = struct.Struct("<21s3x8sI")
_HEAD = struct.Struct("<8sQQIIQI")
_CHECK = struct.Struct("<I")
_HEAD_BYTES = _HEAD.size + _CHECK.size
_TAIL = struct.Struct("<8sQ")

END = bytes(_LINE)
"""What follows the last record."""

_ALLOCATED = 16 << 20
"""Space is set aside in portions of so many bytes, where there is as much."""

_JSON_BYTES = 4096
"""What the JSON of a record may take, about, beside what follows."""

_ENTRY_BYTES = 128
"""The same for a tensor or a group that it speaks of."""

_ELEMENTS_A_BYTE = 128
"""And a byte for so many elements: a piece of a vector has thousands, and takes some 25 bytes of JSON."""


def journal_name(number: int) -> str:
    """Returns the name of a journal's file."""
    return f"journal-{number:08}"


class _Head(NamedTuple):
    """A record's head.

    Attributes:
        nonce: The file's.
        number: The record's index.
        safe: The last record that was safe when this one was written.
        json_bytes: Length of the JSON.
        check: CRC-32C of everything that follows the head.
        vector_bytes: Length of the vector.
        spare: 0.
    """

    nonce: bytes
    number: int
    safe: int
    json_bytes: int
    check: int
    vector_bytes: int
    spare: int = 0

    @property
    def vector_at(self) -> int:
        """Where the vector begins, from the record's start."""
        return _up(_HEAD_BYTES + self.json_bytes)

    @property
    def total_bytes(self) -> int:
        """Length of the record."""
        return _up(self.vector_at + self.vector_bytes + _TAIL.size)

    def packed(self) -> bytes:
        """Returns its bytes."""
        raw = _HEAD.pack(*self)
        return raw + _CHECK.pack(crc32c(raw))


class Journal:
    """A journal that is written to.

    Args:
        files: The model's folder.
        number: The journal's; a new one.

    Raises:
        OSError: It cannot be made.

    Attributes:
        number: As above.
        where: The file.
        size: How many bytes of it are written.
    """

    def __init__(self, files: Files, number: int) -> None:
        self.number = number
        self.where = str(files.folder / journal_name(number))
        self.size = _LINE
        self._nonce = secrets.token_bytes(8)
        self._file = files.create(journal_name(number))
        self._allocated = 0
        self._lock = threading.Lock()
        try:
            self.reserve(_LINE + len(END))
            self._file.write(0, [_title(self._nonce)])
            self._file.sync()
            files.sync()
        except BaseException:
            self._file.close()
            with suppress(OSError):  # on a full disk, what it has got of it
                files.remove(journal_name(number))
            raise

    def reserve(self, stop: int) -> None:
        """Has space set aside up to byte `stop`, if it is written to still; raises OSError where there is none."""
        with self._lock:
            if stop > self._allocated:
                end = -(-stop // _ALLOCATED) * _ALLOCATED
                try:
                    self._file.allocate(self._allocated, end)
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    end = stop
                    self._file.allocate(self._allocated, end)
                self._allocated = end

    def write(self, records: Sequence[Record], safe: int, *, sync: bool) -> None:
        """Adds records.

        Args:
            records: What happened.
            safe: Index of the last record that is safe.
            sync: Whether they are to be on the disk when this returns.

        Raises:
            OSError: They are not all written, and the file is not to be written to again.
        """
        buffers = [buffer for record in records for buffer in _encoded(record, self._nonce, safe)]
        end = self.size + sum(map(len, buffers))
        self.reserve(end + len(END))
        self._file.write(self.size, buffers)
        failpoint("journal.written")
        if sync:
            self._file.sync()
        self.size = end

    def close(self) -> None:
        """Ends the journal; what was set aside for it and not used is given back."""
        with self._lock:
            self._allocated = sys.maxsize
            with suppress(OSError):
                self._file.write(self.size, [END])  # over a record that could not be written whole
                self._file.cut(self.size + len(END))
            self._file.close()


def record_bytes(elements: int, entries: int) -> int:
    """Returns how long a record is at the most, about.

    Args:
        elements: Of its vector.
        entries: How many tensors and groups it may speak of.
    """
    return elements * 4 + elements // _ELEMENTS_A_BYTE + entries * _ENTRY_BYTES + _JSON_BYTES


class Reading:
    """What a journal holds, read one record after the other.

    Args:
        files: The model's folder.
        number: The journal's.
        after: Index of the record that comes before its first.
        lost_power: Whether the machine was started anew since it was written: then a part of the last records may be
            missing, while what was written after that part is there.
        begun: Whether it is known to have been there, with its title.

    Attributes:
        size: Bytes up to which it was read and is good.
        total: Bytes of the file; 0 where there is none.
        index: Of the last record that was read.
        where: The file.
        tail: The last records that were written in one go: where they begin, and their bytes. Nobody says of them, in
            this file, that they were safe.
    """

    def __init__(self, files: Files, number: int, after: int, *, lost_power: bool, begun: bool = False) -> None:
        name = journal_name(number)
        self.total = 0
        with suppress(FileNotFoundError):
            self.total = files.size(name)
        self.size = 0
        self.index = after
        self.where = str(files.folder / name)
        self._lost_power = lost_power
        self._begun = begun
        self._mapped: mmap | bytes = b""
        self._data = memoryview(self._mapped)
        self._nonce = b""
        self._starts: list[int] = []
        self._safe = after

    @property
    def tail(self) -> tuple[int, memoryview]:
        """As above."""
        count = min(self.index - self._safe, len(self._starts))
        start = self._starts[-count] if count > 0 else self.size
        return start, self._data[start : self.size]

    def records(self) -> Iterator[Record]:
        """Yields the records up to where the journal was torn, or ends; their vectors lie in the file.

        Raises:
            CorruptError: The journal is not what was written, or the disk cannot read it.
        """
        self._mapped = _mapped(Path(self.where), self.total)
        self._data = memoryview(self._mapped)
        title = any(self._data[:_LINE])
        if len(self._data) < _LINE or not (title or np.frombuffer(self._data, np.uint8).any()):
            if self._begun:
                raise self._corrupt(
                    "it was cut, and all its records are gone" if self.total else "it is missing, or empty"
                )
            return  # made, and nobody was told of anything in it
        self._nonce = bytes(self._data[24:32])
        if self._data[:_LINE] != _title(self._nonce):
            raise self._corrupt("its title is not that of a journal")
        self.size = _LINE
        while head := self._head():
            record = self._record(head)
            if record is None:
                break
            yield record
        self._check_rest()

    def _head(self) -> _Head | None:
        """Returns the next record's head; None where there is none."""
        raw = self._data[self.size : self.size + _HEAD_BYTES]
        if len(raw) < _HEAD_BYTES:
            self._check_end()
            return None
        if not any(raw):
            return None
        head = _parsed(raw, self._nonce)
        if head is None:
            raise self._corrupt(f"the record at byte {self.size} is bad")
        if head.number != self.index + 1:
            raise self._corrupt(f"record {self.index + 1} is missing, {head.number} is in its place")
        return head

    def _record(self, head: _Head) -> Record | None:
        """Returns the record; None where it is torn."""
        data = self._data[self.size : self.size + head.total_bytes]
        if len(data) < head.total_bytes:
            self._check_end()
            return None
        if crc32c(data[_HEAD_BYTES:]) != head.check:
            if _torn(data, self.size, anywhere=self._lost_power) and not self._is_moved(head):
                if any(data[-_TAIL.size :]):  # where a vector has a sector of zeros the two look alike
                    text = "%s: record %d is left out: a loss of power has torn it, or it was changed since"
                    _log.warning(text, self.where, head.number)
                return None
            raise self._corrupt(f"the checksum of record {head.number} is wrong")
        where = f"{self.where}: record {head.number}"
        header = decoded(data[_HEAD_BYTES : _HEAD_BYTES + head.json_bytes], Header, where)
        vector = data[head.vector_at : head.vector_at + head.vector_bytes]
        self._starts.append(self.size)
        self._safe = head.safe
        self.size += head.total_bytes
        self.index = head.number
        return Record(head.number, header.event, _pieces(header, vector, where))

    def _is_moved(self, head: _Head) -> bool:
        """Whether a record's tail is there, but not where it belongs: it was whole once."""
        found = self._mapped.find(_TAIL.pack(self._nonce, head.number), self.size + 1)
        return found not in (-1, self.size + head.total_bytes - _TAIL.size)

    def _check_rest(self) -> None:
        """Raises CorruptError where a record beyond, wherever it is, says that one which is not here was safe."""
        at = self.size
        while (at := self._mapped.find(self._nonce, at)) >= 0:
            head = _parsed(self._data[at : at + _HEAD_BYTES], self._nonce)
            if head and head.safe > self.index:
                raise self._corrupt(f"record {self.index + 1} is bad, and later ones are good")
            at += 1

    def _check_end(self) -> None:
        """Raises CorruptError where the file ends before it may."""
        if not self._lost_power:
            raise self._corrupt(f"it was cut at byte {self.total}, after record {self.index}")

    def _corrupt(self, what: str) -> CorruptError:
        return CorruptError(self.where, what)


def _title(nonce: bytes) -> bytes:
    check = crc32c(_TITLE.pack(_MAGIC, nonce, 0))
    return _TITLE.pack(_MAGIC, nonce, check).ljust(_LINE, b"\0")


def _encoded(record: Record, nonce: bytes, safe: int) -> list[bytes | memoryview]:
    """Returns a record's parts."""
    pieces = tuple((offset, values.size, values.dtype.str) for offset, values in record.pieces)
    body = msgspec.json.encode(Header(finite(record.event), pieces))
    vectors = [memoryview(values.data).cast("B") for _, values in record.pieces]
    head = _Head(nonce, record.index, safe, len(body), 0, sum(map(len, vectors)))
    front = body + bytes(head.vector_at - _HEAD_BYTES - len(body))
    back = bytes(head.total_bytes - head.vector_at - head.vector_bytes - _TAIL.size) + _TAIL.pack(nonce, record.index)
    check = crc32c(front)
    for vector in vectors:
        check = crc32c(vector, check)
    check = crc32c(back, check)
    return [head._replace(check=check).packed() + front, *vectors, back]


def _parsed(raw: memoryview, nonce: bytes) -> _Head | None:
    """Returns a head; None where the bytes are none of this file."""
    if len(raw) < _HEAD_BYTES or _CHECK.unpack_from(raw, _HEAD.size)[0] != crc32c(raw[: _HEAD.size]):
        return None
    head = _Head(*_HEAD.unpack_from(raw))
    return head if head.nonce == nonce else None


def _torn(data: memoryview, start: int, *, anywhere: bool) -> bool:
    """Whether a part of a record is zeros: its tail; or any, as a disk writes them, where they came out of order.

    Args:
        data: The record.
        start: Where it begins in the file.
        anywhere: Whether it may be any part.
    """
    if not any(data[-_TAIL.size :]):
        return True
    edges = [0, *range(-start % _SECTOR, len(data), _SECTOR), len(data)]
    return anywhere and any(low < high and not any(data[low:high]) for low, high in pairwise(edges))


def _pieces(header: Header, vector: memoryview, where: str) -> list[Piece]:
    """Cuts a record's vector into its pieces."""
    pieces: list[Piece] = []
    at = 0
    for offset, size, name in header.pieces:
        dtype = DTYPES.get(name)
        if dtype is None or size < 0 or at + size * dtype.itemsize > len(vector):
            raise CorruptError(where, "its vector is not what its header says")
        pieces.append((offset, np.frombuffer(vector, dtype, size, at)))
        at += size * dtype.itemsize
    return pieces


def _mapped(path: Path, size: int) -> mmap | bytes:
    """Returns a file's bytes, as they lie in the system's memory.

    They are read here: where the disk fails, this says so. Through the mapping that would be a signal that ends the
    process.
    """
    if not size:
        return b""
    part = bytearray(_PART)
    with readable(str(path)), path.open("rb", buffering=0) as file:
        while file.readinto(part):
            pass
        return mmap(file.fileno(), size, access=ACCESS_READ)


def _up(size: int) -> int:
    """Returns the next multiple of a line's length."""
    return -(-size // _LINE) * _LINE
