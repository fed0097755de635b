"""A snapshot: a model's whole state at one moment, as two files.

`snapshot-N.safetensors` holds weights, square_avg and acc_delta, tensor by tensor, as anything that knows safetensors
can read them. `snapshot-N.json`, the manifest, is written when that is safe: it holds everything else, and the
checksum of the first. A snapshot without a manifest is none.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import msgspec
from crc32c import crc32c

from deltaserve._common.failpoints import failpoint
from deltaserve_server.durability.checked import packed, unpacked
from deltaserve_server.durability.errors import CorruptError, readable
from deltaserve_server.durability.files import Files
from deltaserve_server.durability.validation import InvalidRecord, check_model
from deltaserve_server.memory import State
from deltaserve_server.memory.store import ELEMENT_BYTES, Vector, allocate_host
from deltaserve_server.model import Layout
from deltaserve_server.model.state import MachineState

_FORMAT = "deltaserve snapshot 1"
_PART = 4 << 20
"""Bytes that are read, or written, at a time."""

_HEAD_BYTES = 100 << 20
"""What a reader of safetensors takes for the JSON at most."""

VECTORS = ("weights", "square_avg", "acc_delta")

Progress = Callable[[int], None]
"""Is told how many further bytes were read."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a snapshot holds beside its tensors.

    Attributes:
        format: The kind and version of this file.
        number: The snapshot's.
        taken_at: In seconds since 1970, UTC.
        index: Of the last of the model's records that is part of it.
        journal: Number of the first journal whose records come after it; None where there is none.
        bytes: Length of the file of tensors.
        check: Its CRC-32C.
        model: The model without its vectors.
    """

    format: str
    number: int
    taken_at: float
    index: int
    journal: int | None
    bytes: int
    check: int
    model: MachineState

    @property
    def follows(self) -> int:
        """Number from which on journals come after it: numbers only grow, also where it was taken without a journal."""
        return self.number + 1 if self.journal is None else self.journal


class Entry(NamedTuple):
    """A snapshot in a line."""

    number: int
    version: int
    bytes: int
    taken_at: float


def tensors_name(number: int) -> str:
    """Returns the name of a snapshot's file of tensors."""
    return f"snapshot-{number:08}.safetensors"


def manifest_name(number: int) -> str:
    """Returns the name of its manifest."""
    return f"snapshot-{number:08}.json"


def write(
    files: Files, number: int, taken_at: float, index: int, journal: int | None, model: MachineState, state: State
) -> Entry:
    """Writes a snapshot; it is safe when this returns.

    Raises:
        OSError: It could not be written; what there was before is as it was.
    """
    parts: list[bytes | memoryview] = [_head(model, index)]
    for name in VECTORS:
        raw = getattr(state, name).data.cast("B")
        parts += [raw[at : at + _PART] for at in range(0, len(raw), _PART)]
    check = 0
    for part in parts:
        check = crc32c(part, check)
    failpoint("snapshot.cut")
    manifest = Manifest(
        format=_FORMAT,
        number=number,
        taken_at=taken_at,
        index=index,
        journal=journal,
        bytes=sum(map(len, parts)),
        check=check,
        model=model,
    )
    content = packed(manifest)
    with _whole(files, number):
        files.put(tensors_name(number), parts)
        failpoint("snapshot.tensors")
        files.put(manifest_name(number), [content])
    failpoint("snapshot.manifest")
    return Entry(number, model.version, manifest.bytes + len(content), taken_at)


@contextmanager
def _whole(files: Files, number: int) -> Iterator[None]:
    """Removes tensors that have no manifest where the disk refuses: tried often, they would fill it."""
    try:
        yield
    except OSError:
        with suppress(OSError):
            if manifest_name(number) not in files.names():
                files.remove(tensors_name(number))
        raise


def read_manifest(files: Files, number: int) -> Manifest:
    """Returns a snapshot's manifest.

    Raises:
        CorruptError: It is not what was written.
    """
    name = manifest_name(number)
    where = str(files.folder / name)
    with readable(where):
        content = files.read(name)
    manifest = unpacked(content, Manifest, where)
    if manifest.format != _FORMAT or manifest.number != number:
        raise CorruptError(where, f"expected {_FORMAT}, number {number}")
    try:
        check_model(manifest.model)
    except InvalidRecord as error:
        raise CorruptError(where, str(error)) from None
    return manifest


def read_state(files: Files, manifest: Manifest, progress: Progress) -> State:
    """Returns a snapshot's vectors.

    Raises:
        CorruptError: They are not what was written.
    """
    name = tensors_name(manifest.number)
    where = str(files.folder / name)
    size, head = Layout(manifest.model.tensors).size, _head(manifest.model, manifest.index)
    if manifest.bytes != len(head) + len(VECTORS) * size * ELEMENT_BYTES:
        raise CorruptError(where, "its length in the manifest is not that of the model")
    try:
        if files.size(name) != manifest.bytes:
            raise CorruptError(where, f"it has {files.size(name)} bytes, not {manifest.bytes}")
        with readable(where), (files.folder / name).open("rb", buffering=0) as file:
            found = file.read(len(head))
            check, vectors = crc32c(found), []
            for _ in VECTORS:
                vector = allocate_host(size)
                check = _read(file, vector, check, progress)
                vectors.append(vector)
    except FileNotFoundError:
        raise CorruptError(where, "it is missing") from None
    if check != manifest.check or found != head:
        raise CorruptError(where, "its checksum is wrong")
    return State(*vectors)


def _read(file: Any, vector: Vector, check: int, progress: Progress) -> int:
    """Fills a vector from a file; returns the checksum that goes on from `check`."""
    raw = vector.data.cast("B")
    for at in range(0, len(raw), _PART):
        part = raw[at : at + _PART]
        got = 0
        while got < len(part) and (count := file.readinto(part[got:])):
            got += count
        check = crc32c(part[:got], check)
        progress(got)
    return check


def recorded_index(files: Files, number: int) -> int:
    """Returns the index of the last record that is part of a snapshot, as far as files tell that may be bad.

    Where there are no tensors, there was no snapshot: 0. Where they do not tell, the highest number.
    """
    try:
        return read_manifest(files, number).index
    except CorruptError:
        try:
            with (files.folder / tensors_name(number)).open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                return int(json.loads(file.read(min(size, _HEAD_BYTES)))["__metadata__"]["index"])
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return sys.maxsize


def _head(model: MachineState, index: int) -> bytes:
    """Returns what a safetensors file begins with: the length of its JSON, and that, padded with spaces.

    Written here, not by the library: that takes all tensors as copies, in memory, at once.
    """
    entries = {"__metadata__": {"model": model.name, "version": str(model.version), "index": str(index)}}
    body = json.dumps(entries | dict(_entries(model)), separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body


def _entries(model: MachineState) -> Iterator[tuple[str, Any]]:
    layout = Layout(model.tensors)
    for place, vector in enumerate(VECTORS):
        for index, tensor in enumerate(layout.tensors):
            start, stop = ((place * layout.size + layout.offsets[edge]) * ELEMENT_BYTES for edge in (index, index + 1))
            yield (
                f"{vector}/{tensor.name}",
                {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, stop]},
            )
