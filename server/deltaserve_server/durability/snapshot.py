"""A snapshot: the whole state of a model at one moment, in two files.

`snapshot-N.safetensors` contains the weights and then each slot of the optimizer, tensor by tensor, as `weights/NAME`
and `SLOT/NAME`; any safetensors reader can read it. `snapshot-N.json`, the manifest, contains everything else and the
checksum of the first file. The server writes the manifest when the first file is on the disk, so a snapshot exists
exactly if its manifest does.
"""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec
from crc32c import crc32c

from deltaserve._common.failpoints import failpoint
from deltaserve_server.durability.checked import packed, unpacked
from deltaserve_server.durability.errors import CorruptError, unreadable_is_corrupt
from deltaserve_server.durability.files import Files
from deltaserve_server.durability.validation import InvalidRecord, check_model
from deltaserve_server.memory import State
from deltaserve_server.memory.store import ELEMENT_BYTES, Vector, allocate_host
from deltaserve_server.model import Layout
from deltaserve_server.model.state import MachineState

_FORMAT = "deltaserve snapshot 3"
_PART_BYTES = 4 << 20
"""Bytes per read or write call: the checksum of a part is computed while the part is in the processor's cache."""

_HEADER_BYTES_MAX = 100 << 20
"""Limit of the safetensors library for the JSON header."""

Progress = Callable[[int], None]
"""Receives the number of bytes read since the last call."""


class _Format(msgspec.Struct, frozen=True):
    """The part of a manifest that every version of deltaserve can read."""

    format: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a snapshot that is not tensors.

    Attributes:
        format: Kind and version of this file.
        number: Number of the snapshot.
        taken_at: When it was taken, in seconds since 1970, UTC.
        index: Index of the last record that the snapshot includes.
        journal: Number of the journal that continues it; None if the server kept none.
        bytes: Length of the tensor file.
        checksum: CRC-32C of the tensor file.
        model: The model's state, without its vectors.
    """

    format: str
    number: int
    taken_at: float
    index: int
    journal: int | None
    bytes: int
    checksum: int
    model: MachineState

    @property
    def first_journal(self) -> int:
        """Number of the first journal that may continue the snapshot.

        A snapshot taken without a journal may be followed by one of a later start: its number is higher, since
        snapshots and journals count together.
        """
        return self.number + 1 if self.journal is None else self.journal


class Entry(NamedTuple):
    """A snapshot in a list of snapshots.

    Attributes:
        number: Number of the snapshot.
        version: Version of the model.
        bytes: Length of its files.
        taken_at: When it was taken, in seconds since 1970, UTC.
    """

    number: int
    version: int
    bytes: int
    taken_at: float


def tensors_name(number: int) -> str:
    """Returns the name of a snapshot's tensor file."""
    return f"snapshot-{number:08}.safetensors"


def manifest_name(number: int) -> str:
    """Returns the name of a snapshot's manifest."""
    return f"snapshot-{number:08}.json"


def write(
    files: Files, number: int, taken_at: float, index: int, journal: int | None, model: MachineState, state: State
) -> Entry:
    """Writes a snapshot. It is on the disk when this returns.

    Raises:
        OSError: It was not written. Earlier snapshots are unchanged.
    """
    parts: list[bytes | memoryview] = [_tensors_header(model, index)]
    for vector in state.vectors:
        raw = vector.data.cast("B")
        parts += [raw[at : at + _PART_BYTES] for at in range(0, len(raw), _PART_BYTES)]
    # Over the vectors in memory, not the file: what the disk changes while it writes is found at recovery.
    checksum = 0
    for part in parts:
        checksum = crc32c(part, checksum)
    failpoint("snapshot.cut")
    manifest = Manifest(
        format=_FORMAT,
        number=number,
        taken_at=taken_at,
        index=index,
        journal=journal,
        bytes=sum(map(len, parts)),
        checksum=checksum,
        model=model,
    )
    content = packed(manifest)
    try:
        files.put(tensors_name(number), parts)
        failpoint("snapshot.tensors")
        files.put(manifest_name(number), [content])
    except OSError:
        with suppress(OSError):
            # A manifest whose name is there may have reached the disk, whatever its last sync said. Without one the
            # tensors go: repeated attempts would fill the disk.
            if manifest_name(number) not in files.names():
                files.remove(tensors_name(number))
        raise
    failpoint("snapshot.manifest")
    return Entry(number, model.version, manifest.bytes + len(content), taken_at)


def read_manifest(files: Files, number: int) -> Manifest:
    """Returns the manifest of a snapshot.

    Raises:
        CorruptError: It is not what was written.
    """
    name = manifest_name(number)
    where = str(files.folder / name)
    with unreadable_is_corrupt(where):
        content = files.read(name)
    found = unpacked(content, _Format, where).format
    if found != _FORMAT:
        raise CorruptError(where, f"another version of deltaserve wrote it: its format is {found}, not {_FORMAT}")
    manifest = unpacked(content, Manifest, where)
    if manifest.number != number:
        raise CorruptError(where, f"it is the manifest of snapshot {manifest.number}")
    try:
        check_model(manifest.model)
    except InvalidRecord as error:
        raise CorruptError(where, str(error)) from None
    return manifest


def read_state(files: Files, manifest: Manifest, progress: Progress) -> State:
    """Returns the vectors of a snapshot.

    Raises:
        CorruptError: The tensor file is not what was written.
    """
    name = tensors_name(manifest.number)
    where = str(files.folder / name)
    size, header = Layout(manifest.model.tensors).size, _tensors_header(manifest.model, manifest.index)
    count = len(_vector_names(manifest.model))
    # Compared before anything is allocated: a forged manifest must not make the server reserve memory.
    if manifest.bytes != len(header) + count * size * ELEMENT_BYTES:
        raise CorruptError(where, "its length in the manifest is not that of the model")
    try:
        if files.size(name) != manifest.bytes:
            raise CorruptError(where, f"it has {files.size(name)} bytes, not {manifest.bytes}")
        with unreadable_is_corrupt(where), (files.folder / name).open("rb", buffering=0) as file:
            found = file.read(len(header))
            checksum = crc32c(found)
            weights, *slots = vectors = [allocate_host(size) for _ in range(count)]
            for vector in vectors:
                checksum = _read(file, vector, checksum, progress)
    except FileNotFoundError:
        raise CorruptError(where, "it is missing") from None
    if checksum != manifest.checksum or found != header:
        raise CorruptError(where, "its checksum is wrong")
    return State(weights, tuple(slots))


def _read(file: Any, vector: Vector, checksum: int, progress: Progress) -> int:
    """Fills a vector from a file; returns the checksum continued over its bytes."""
    raw = vector.data.cast("B")
    for at in range(0, len(raw), _PART_BYTES):
        part = raw[at : at + _PART_BYTES]
        got = 0
        # read() may return less than asked for, and 0 only at the end of the file.
        while got < len(part) and (count := file.readinto(part[got:])):
            got += count
        checksum = crc32c(part[:got], checksum)
        progress(got)
    return checksum


def last_index_of_corrupt(files: Files, number: int) -> int:
    """Returns the index of the last record that a corrupt snapshot includes, as far as its files still tell.

    Returns 0 if the tensor file is missing, because then the snapshot was never finished; and the highest number if
    neither file tells.
    """
    try:
        return read_manifest(files, number).index
    except CorruptError:
        try:
            with (files.folder / tensors_name(number)).open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                return int(json.loads(file.read(min(size, _HEADER_BYTES_MAX)))["__metadata__"]["index"])
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return sys.maxsize


def _vector_names(model: MachineState) -> tuple[str, ...]:
    """Returns the names of a model's vectors in order: the weights, and the slots of its optimizer."""
    return "weights", *(slot.name for slot in model.settings.groups[0].slots)


def _tensors_header(model: MachineState, index: int) -> bytes:
    """Returns the start of a safetensors file: the length of its JSON header, and the header padded with spaces.

    The safetensors library is not used to write: it copies all tensors into one buffer first.
    """
    metadata = {"model": model.name, "version": str(model.version), "index": str(index)}
    entries: dict[str, Any] = {"__metadata__": metadata}
    layout = Layout(model.tensors)
    for place, vector in enumerate(_vector_names(model)):
        for tensor, edges in zip(layout.tensors, pairwise(layout.offsets), strict=True):
            offsets = [(place * layout.size + edge) * ELEMENT_BYTES for edge in edges]
            entries[f"{vector}/{tensor.name}"] = {
                "dtype": "F32",
                "shape": list(tensor.shape),
                "data_offsets": offsets,
            }
    body = json.dumps(entries, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body
