"""A journal file: the records of a model, one after the other.

The file starts with a header of 64 bytes. Every record starts at a multiple of 64 bytes and consists of a header of 48
bytes, a JSON body, the vector at the next multiple of 64, and a trailer of 16 bytes that ends at one. At least 64 zero
bytes follow the last record. Header and trailer contain a random number of the file (the nonce), so that no vector can
be mistaken for a record.

The reader tells a torn write from corruption. Space is allocated, and therefore zero, before a record is written; a
write that a crash interrupted leaves some of those zeros, and nobody was told of its record, so the journal ends there.
Every other difference was made later and is an error: a wrong checksum, a missing record where a later one says that it
was durable, or a file that ends without the zeros. Only a power failure can shorten a file, because only then is the
file system's own metadata lost.
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
from deltaserve_server.durability.errors import CorruptError, disk_operation, unreadable_is_corrupt
from deltaserve_server.durability.files import Files
from deltaserve_server.durability.records import DTYPES, Piece, Record, RecordBody, finite

_log = logging.getLogger(__name__)

_ALIGNMENT = 64
_READ_BYTES = 4 << 20
"""Bytes per read call."""

_SECTOR = 512
"""Bytes that a disk writes whole or not at all."""

_MAGIC = b"deltaserve journal 3\n"
_FILE_HEADER = struct.Struct("<21s3x8sI")
_HEADER = struct.Struct("<8sQQIIQI")
_CHECKSUM = struct.Struct("<I")
_HEADER_BYTES = _HEADER.size + _CHECKSUM.size
_TRAILER = struct.Struct("<8sQ")

END = bytes(_ALIGNMENT)
"""Zeros that follow the last record."""

_ALLOCATED = 16 << 20
"""Bytes per allocation of disk space, if the disk has as many: fewer, larger extents and fewer system calls."""

_JSON_BYTES = 4096
"""Estimated length of a record's JSON, without the parts below."""

_ENTRY_BYTES = 256
"""Estimated JSON length for each tensor or group that a record mentions."""

_ELEMENTS_PER_JSON_BYTE = 128
"""A piece of a vector has thousands of elements and takes about 25 bytes of JSON."""


def journal_name(number: int) -> str:
    """Returns the file name of a journal."""
    return f"journal-{number:08}"


class _RecordHeader(NamedTuple):
    """The header of record `number`.

    Attributes:
        durable: Index of the last record that was durable when this one was written.
        checksum: CRC-32C of everything after the header.
    """

    nonce: bytes
    number: int
    durable: int
    json_bytes: int
    checksum: int
    vector_bytes: int
    spare: int = 0

    @property
    def vector_at(self) -> int:
        """Offset of the vector from the start of the record."""
        return _aligned(_HEADER_BYTES + self.json_bytes)

    @property
    def total_bytes(self) -> int:
        """Length of the record."""
        return _aligned(self.vector_at + self.vector_bytes + _TRAILER.size)

    def packed(self) -> bytes:
        """Returns the header as bytes, with its own checksum."""
        raw = _HEADER.pack(*self)
        return raw + _CHECKSUM.pack(crc32c(raw))


class Journal:
    """A new journal, open for writing.

    Raises:
        OSError: The file cannot be created.

    Attributes:
        size: Bytes written so far.
    """

    def __init__(self, files: Files, number: int) -> None:
        self.number = number
        self.where = str(files.folder / journal_name(number))
        self.size = _ALIGNMENT
        self._nonce = secrets.token_bytes(8)
        self._file = files.create(journal_name(number))
        self._allocated = 0
        # A push reserves space under the model's lock, while a flush, without that lock, may close the journal.
        self._lock = threading.Lock()
        try:
            self.reserve(_ALIGNMENT + len(END))
            with disk_operation("creating", Path(self.where), _ALIGNMENT):
                self._file.write(0, [_file_header(self._nonce)])
                self._file.sync()
            files.sync()
        except BaseException:
            self._file.close()
            with suppress(OSError):  # tried again and again, empty journals would fill the disk
                files.remove(journal_name(number))
            raise

    def reserve(self, stop: int) -> None:
        """Allocates disk space up to byte `stop`, unless the journal is closed; raises OSError if the disk is full."""
        with self._lock, disk_operation("allocating", Path(self.where), stop - self._allocated):
            if stop > self._allocated:
                end = -(-stop // _ALLOCATED) * _ALLOCATED
                try:
                    self._file.allocate(self._allocated, end)
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    end = stop  # a nearly full disk may still have what this record needs
                    self._file.allocate(self._allocated, end)
                self._allocated = end

    def write(self, records: Sequence[Record], durable: int, *, sync: bool) -> None:
        """Appends records; record `durable` and those before it are durable already. `sync` waits for the disk.

        Raises:
            OSError: Not all records were written. The journal must not be written to again (see `files`).
        """
        # One write and one fsync for the whole batch.
        buffers = [buffer for record in records for buffer in _encoded(record, self._nonce, durable)]
        end = self.size + sum(map(len, buffers))
        self.reserve(end + len(END))
        with disk_operation("appending", Path(self.where), end - self.size):
            self._file.write(self.size, buffers)
            failpoint("journal.written")
            if sync:
                self._file.sync()
        self.size = end

    def close(self) -> None:
        """Closes the journal and frees the space that it has allocated and not used."""
        with self._lock:
            self._allocated = sys.maxsize  # a late `reserve` must not touch the closed file
            with suppress(OSError):
                self._file.write(self.size, [END])  # over a record that was only partly written
                self._file.cut(self.size + len(END))
            self._file.close()


def record_bytes(elements: int, entries: int) -> int:
    """Returns an upper estimate of a record's length.

    Args:
        elements: Number of elements in its vector.
        entries: Number of tensors and groups that it may mention.
    """
    return elements * 4 + elements // _ELEMENTS_PER_JSON_BYTE + entries * _ENTRY_BYTES + _JSON_BYTES


class JournalReader:
    """Reads the records of a journal, one after the other.

    Args:
        after: Index of the record that precedes the journal's first.
        lost_power: Whether the machine may have restarted since the journal was written. Then disk sectors may be
            missing in the middle of the last records while later sectors are there.
        must_exist: Whether the journal is known to have been created.

    Attributes:
        size: Bytes that were read and are good.
        file_bytes: Length of the file; 0 if there is none.
        index: Index of the last record read.
    """

    def __init__(self, files: Files, number: int, after: int, *, lost_power: bool, must_exist: bool = False) -> None:
        name = journal_name(number)
        self.file_bytes = 0
        with suppress(FileNotFoundError):
            self.file_bytes = files.size(name)
        self.size = 0
        self.index = after
        self.where = str(files.folder / name)
        self._lost_power = lost_power
        self._must_exist = must_exist
        self._map: mmap | bytes = b""
        self._data = memoryview(self._map)
        self._nonce = b""
        self._starts: list[int] = []
        self._durable = after

    @property
    def last_batch(self) -> tuple[int, memoryview]:
        """Offset and bytes of the records that were written last, in one go: no later record says they are durable."""
        count = min(self.index - self._durable, len(self._starts))
        start = self._starts[-count] if count > 0 else self.size
        return start, self._data[start : self.size]

    def records(self) -> Iterator[Record]:
        """Yields the records up to the end of the journal or a torn write. Their vectors are views of the file.

        Raises:
            CorruptError: The journal is not what was written, or the disk cannot read it.
        """
        self._map = _mapped(Path(self.where), self.file_bytes)
        self._data = memoryview(self._map)
        header = self._data[:_ALIGNMENT]
        if len(header) < _ALIGNMENT or not (any(header) or np.frombuffer(self._data, np.uint8).any()):
            if self._must_exist:
                raise self._corrupt(
                    "it was cut, and all its records are gone" if self.file_bytes else "it is missing, or empty"
                )
            return  # the server died while it created the journal
        self._nonce = bytes(header[24:32])
        if header != _file_header(self._nonce):
            raise self._corrupt("its header is not that of a journal")
        self.size = _ALIGNMENT
        while next_header := self._header():
            record = self._record(next_header)
            if record is None:
                break
            yield record
        # A record further on may say that the one missing here was durable. Searched byte by byte: behind a torn record
        # nobody knows where the next one starts.
        at = self.size
        while (at := self._map.find(self._nonce, at)) >= 0:
            later = _parsed(self._data[at : at + _HEADER_BYTES], self._nonce)
            if later and later.durable > self.index:
                raise self._corrupt(f"record {self.index + 1} is bad, and later ones are good")
            at += 1

    def _header(self) -> _RecordHeader | None:
        """Returns the header of the next record; None at the end of the journal."""
        raw = self._data[self.size : self.size + _HEADER_BYTES]
        if len(raw) < _HEADER_BYTES:
            self._check_end()
            return None
        if not any(raw):
            return None
        header = _parsed(raw, self._nonce)
        if header is None:
            raise self._corrupt(f"the record at byte {self.size} is bad")
        if header.number != self.index + 1:
            raise self._corrupt(f"record {self.index + 1} is missing, {header.number} is in its place")
        return header

    def _record(self, header: _RecordHeader) -> Record | None:
        """Returns the record that follows a header; None if it is torn."""
        data = self._data[self.size : self.size + header.total_bytes]
        if len(data) < header.total_bytes:
            self._check_end()
            return None
        if crc32c(data[_HEADER_BYTES:]) != header.checksum:
            # A trailer further on shows that the record was once whole: bytes were inserted or removed since.
            trailer = self._map.find(_TRAILER.pack(self._nonce, header.number), self.size + 1)
            is_moved = trailer not in (-1, self.size + header.total_bytes - _TRAILER.size)
            if _is_torn(data, self.size, anywhere=self._lost_power) and not is_moved:
                if any(data[-_TRAILER.size :]):  # a vector may contain a sector of zeros, which looks like a torn one
                    _log.warning(
                        "%s: record %d is dropped: a power failure has torn it, or it was changed since",
                        self.where,
                        header.number,
                    )
                return None
            raise self._corrupt(f"the checksum of record {header.number} is wrong")
        where = f"{self.where}: record {header.number}"
        body = decoded(data[_HEADER_BYTES : _HEADER_BYTES + header.json_bytes], RecordBody, where)
        vector = data[header.vector_at : header.vector_at + header.vector_bytes]
        self._starts.append(self.size)
        self._durable = header.durable
        self.size += header.total_bytes
        self.index = header.number
        return Record(header.number, body.event, _pieces(body, vector, where))

    def _check_end(self) -> None:
        """Raises CorruptError if the file is shorter than it was: a crash of the process cannot cause that."""
        if not self._lost_power:
            raise self._corrupt(f"it was cut at byte {self.file_bytes}, after record {self.index}")

    def _corrupt(self, what: str) -> CorruptError:
        return CorruptError(self.where, what)


def _file_header(nonce: bytes) -> bytes:
    checksum = crc32c(_FILE_HEADER.pack(_MAGIC, nonce, 0))
    return _FILE_HEADER.pack(_MAGIC, nonce, checksum).ljust(_ALIGNMENT, b"\0")


def _encoded(record: Record, nonce: bytes, durable: int) -> list[bytes | memoryview]:
    """Returns a record as buffers; the vectors are not copied."""
    pieces = tuple((offset, values.size, values.dtype.str) for offset, values in record.pieces)
    body = msgspec.json.encode(RecordBody(finite(record.event), pieces))
    vectors = [memoryview(values.data).cast("B") for _, values in record.pieces]
    header = _RecordHeader(nonce, record.index, durable, len(body), 0, sum(map(len, vectors)))
    front = body + bytes(header.vector_at - _HEADER_BYTES - len(body))
    padding = bytes(header.total_bytes - header.vector_at - header.vector_bytes - _TRAILER.size)
    back = padding + _TRAILER.pack(nonce, record.index)
    checksum = crc32c(front)
    for vector in vectors:
        checksum = crc32c(vector, checksum)
    checksum = crc32c(back, checksum)
    return [header._replace(checksum=checksum).packed() + front, *vectors, back]


def _parsed(raw: memoryview, nonce: bytes) -> _RecordHeader | None:
    """Returns a record header; None if the bytes are not a header of this file."""
    if len(raw) < _HEADER_BYTES or _CHECKSUM.unpack_from(raw, _HEADER.size)[0] != crc32c(raw[: _HEADER.size]):
        return None
    header = _RecordHeader(*_HEADER.unpack_from(raw))
    # A vector may contain bytes of another journal's record: their nonce differs.
    return header if header.nonce == nonce else None


def _is_torn(data: memoryview, start: int, *, anywhere: bool) -> bool:
    """Returns whether a part of a record is still zeros, as the file was before the record was written.

    A process that dies leaves a prefix of the record, so the trailer is zeros. A disk writes sectors in any order, so
    after a power failure `anywhere` in the record, which is at byte `start` of the file, a sector may be.
    """
    if not any(data[-_TRAILER.size :]):
        return True
    edges = [0, *range(-start % _SECTOR, len(data), _SECTOR), len(data)]
    return anywhere and any(low < high and not any(data[low:high]) for low, high in pairwise(edges))


def _pieces(body: RecordBody, vector: memoryview, where: str) -> list[Piece]:
    """Splits a record's vector into its pieces."""
    pieces: list[Piece] = []
    at = 0
    for offset, size, name in body.pieces:
        dtype = DTYPES.get(name)
        if dtype is None or size < 0 or at + size * dtype.itemsize > len(vector):
            raise CorruptError(where, "its vector does not match its header")
        pieces.append((offset, np.frombuffer(vector, dtype, size, at)))
        at += size * dtype.itemsize
    return pieces


def _mapped(path: Path, size: int) -> mmap | bytes:
    """Maps a file into memory, after reading it once.

    A failing disk raises OSError from read(). Through the mapping it would be SIGBUS, which ends the process.
    """
    if not size:
        return b""
    buffer = bytearray(_READ_BYTES)
    with unreadable_is_corrupt(str(path)), path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
        return mmap(file.fileno(), size, access=ACCESS_READ)


def _aligned(size: int) -> int:
    """Rounds up to the next multiple of the alignment."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
