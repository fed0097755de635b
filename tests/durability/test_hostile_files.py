"""G19: forged files with correct checksums are refused or harmless."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from crc32c import crc32c
from crowd import Crowd
from model_host import TENSORS, Clock, ModelHost, copied, machine, read

from deltaserve._common.optimizers import SGD, Adam, AdamW
from deltaserve_server.durability import journal, snapshot
from deltaserve_server.durability.checked import packed, unpacked
from deltaserve_server.durability.errors import CorruptError
from deltaserve_server.durability.files import Files
from deltaserve_server.durability.folder import HEAD, Head
from deltaserve_server.durability.journal import Journal, JournalReader
from deltaserve_server.durability.records import RecordBody
from deltaserve_server.durability.snapshot import Manifest
from deltaserve_server.memory.store import Vector, allocate_host
from deltaserve_server.model import Async, Bounded, Refused, Sync
from deltaserve_server.service import conversion

EVIL: tuple[Any, ...] = (
    None, "", "x", [], {}, True, -1, 0, 1, 7, 2**31, 2**32, 2**63, 2**64, 10**30, -(10**30), 0.5, -0.5, 1e308, 1e-320,
    [0, 0], [[]], [1, 2, 3], ["a"], {"a": 1}, "AAAA", "\x00", "../../etc",
)  # fmt: skip

NEST: Any = []
for _ in range(3000):
    NEST = [NEST]


@pytest.fixture
def past(quick: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory with every kind of record in its journal, and sessions and settings in its snapshot."""
    clock, host = Clock(monkeypatch), ModelHost(quick / "past")
    crowd = Crowd(host.create(machine(policy=Sync(), optimizer=Adam())), 11, clock)
    for _ in range(3):
        crowd.open()
    _push_all(crowd)
    crowd.close()
    crowd.save()
    for policy in (Bounded(slack=3), Async()):
        crowd.engine.change(crowd.engine.machine.groups, policy)
        crowd.open()
        _push_all(crowd)
    crowd.put_state()
    crowd.extend()
    _push_all(crowd)
    host.die()
    return quick / "past"


def _push_all(crowd: Crowd) -> None:
    for _ in range(6):
        try:
            crowd.push()
        except Refused:
            crowd.done["refused"] = 1


@pytest.fixture(autouse=True)
def nothing_huge_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(size: int) -> Vector:
        assert 0 <= size < 1 << 20, f"{size} elements were to be allocated"
        return allocate_host(size)

    monkeypatch.setattr(snapshot, "allocate_host", allocate)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of every value inside a JSON value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, held in inside:
        yield from leaves(held, (*path, key))


def changed(value: Any, path: tuple[Any, ...], evil: Any) -> Any:
    """Returns a JSON value with the value at a path replaced."""
    if not path:
        return evil
    made = deepcopy(value)
    held = made
    for key in path[:-1]:
        held = held[key]
    held[path[-1]] = evil
    return made


def signed(value: Any) -> bytes:
    """Returns JSON with a correct checksum line."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return b"%b\n%08x\n" % (body, crc32c(body))


def outcome(left: Path, clock: Clock) -> str:
    """Recovers a model and uses it; returns "refused" or "of use". Any other error fails the test."""
    host = ModelHost(left)
    try:
        engine = host.restore()
        with engine.lock:
            conversion.from_position(engine.position).SerializeToString()
            conversion.from_machine(engine.machine).SerializeToString()
        crowd = Crowd(engine, 5, clock)
        for call in (crowd.open, crowd.push, crowd.push, crowd.tick, crowd.extend, crowd.push, crowd.save):
            with suppress(Refused):
                call()
        for _ in range(25):
            crowd.act()
        assert all(np.isfinite(vector).all() for vector in engine.state().vectors)
        return "of use"
    except CorruptError as error:
        if str(left) not in error.where:
            raise
        return "refused"
    finally:
        host.die()


def sweep(
    quick: Path, past: Path, clock: Clock, places: list[tuple[Any, ...]], write: Callable[[Path, Any, Any], None],
    trials: int,
) -> Counter[str]:  # fmt: skip
    chance, counts = random.Random(len(places)), Counter[str]()
    pairs = [(path, evil) for path in places for evil in EVIL]
    failures = []
    for path, evil in pairs if trials > len(pairs) else chance.sample(pairs, trials):
        left = copied(past, quick / "left", lambda made, path=path, evil=evil: write(made, path, evil))  # type: ignore[misc]
        try:
            counts[outcome(left, clock)] += 1
        except (Exception, AssertionError) as error:
            failures.append(f"{path} = {evil!r:.60}: {type(error).__name__}: {str(error)[:100]}")
    shutil.rmtree(quick / "left", ignore_errors=True)
    print(f"\n{counts}")
    assert not failures, f"{len(failures)} of {sum(counts.values()) + len(failures)}:\n" + "\n".join(failures[:400])
    return counts


def trials(many: bool, full: bool, sample: int) -> int:
    return sample if not many else 100_000 if full else 400


def test_a_manifest_of_any_content(
    quick: Path, past: Path, monkeypatch: pytest.MonkeyPatch, many: bool, full: bool
) -> None:
    clock = Clock(monkeypatch)
    name = max((past / "models" / "m").glob("snapshot-*.json")).name
    for older in list((past / "models" / "m").glob("snapshot-*"))[:]:
        if older.stem != name.removesuffix(".json"):
            older.unlink()
    good = json.loads((past / "models" / "m" / name).read_bytes()[:-10])

    def write(left: Path, path: Any, evil: Any) -> None:
        (left / "models" / "m" / name).write_bytes(signed(changed(good, path, evil)))

    counts = sweep(quick, past, clock, list(leaves(good)), write, trials(many, full, 60))
    assert counts["refused"] > counts["of use"]


def test_a_head_of_any_content(
    quick: Path, past: Path, monkeypatch: pytest.MonkeyPatch, many: bool, full: bool
) -> None:
    clock = Clock(monkeypatch)
    head = unpacked((past / "models" / "m" / HEAD).read_bytes(), Head, "head")
    good = json.loads(packed(head.next_lineage(1, lost_at=1))[:-10])

    def write(left: Path, path: Any, evil: Any) -> None:
        (left / "models" / "m" / HEAD).write_bytes(signed(changed(good, path, evil)))

    sweep(quick, past, clock, list(leaves(good)), write, trials(many, full, 40))


class Forged(Journal):
    """A journal with arbitrary records."""

    def forge(self, index: int, header: Any, vector: bytes) -> None:
        body = header if isinstance(header, bytes) else json.dumps(header).encode()
        head = journal._RecordHeader(self._nonce, index, index - 1, len(body), 0, len(vector))
        inside = body + bytes(head.vector_at - journal._HEADER_BYTES - len(body)) + vector
        inside += bytes(head.total_bytes - journal._HEADER_BYTES - len(inside) - journal._TRAILER.size)
        inside += journal._TRAILER.pack(self._nonce, index)
        whole = head._replace(checksum=crc32c(inside)).packed() + inside
        self._file.write(self.size, [whole])
        self.size += len(whole)


def records(past: Path) -> tuple[str, int, list[tuple[int, Any, bytes]]]:
    """Returns the newest journal's name, the index before it, and index, JSON and vector of its records."""
    files = Files(past / "models" / "m")
    name = max(found for found in files.names() if found.startswith("journal"))
    manifest: Manifest = snapshot.read_manifest(files, int(max(files.names())[9:17]))
    reading = JournalReader(files, int(name[8:]), manifest.index, lost_power=False)
    found = []
    for record in reading.records():
        header = RecordBody(record.event, tuple((o, v.size, v.dtype.str) for o, v in record.pieces))
        vector = b"".join(values.tobytes() for _, values in record.pieces)
        found.append((record.index, json.loads(msgspec.json.encode(header)), vector))
    return name, manifest.index, found


def rewrite(left: Path, name: str, content: list[tuple[int, Any, bytes]]) -> None:
    """Replaces a journal by one with arbitrary records."""
    folder = left / "models" / "m"
    (folder / name).unlink()
    forged = Forged(Files(folder), int(name[8:]))
    for record in content:
        forged.forge(*record)
    forged.close()


def test_a_record_of_any_content(
    quick: Path, past: Path, monkeypatch: pytest.MonkeyPatch, many: bool, full: bool
) -> None:
    clock = Clock(monkeypatch)
    name, _, good = records(past)
    assert {header["event"]["type"] for _, header, _ in good} == {
        "update", "session", "settings", "state", "extension",
    }  # fmt: skip
    places = [(number, *path) for number, (_, header, _) in enumerate(good) for path in leaves(header)]

    def write(left: Path, path: Any, evil: Any) -> None:
        made = list(good)
        index, header, vector = made[path[0]]
        made[path[0]] = index, changed(header, path[1:], evil), vector
        rewrite(left, name, made)

    counts = sweep(quick, past, clock, places, write, trials(many, full, 60))
    assert counts["refused"]


@pytest.mark.parametrize(
    ("change", "vector"),
    [
        ({"pieces": []}, b""),
        ({"pieces": [[0, 5, "<f4"]]}, None),
        ({"pieces": [[10, 107, "<f4"]]}, None),
        ({"pieces": [[-3, 117, "<f4"]]}, None),
        ({"pieces": [[0, 117, "<f4"], [0, 117, "<f4"]]}, "twice"),
        ({"pieces": [[100, 17, "<f4"], [0, 100, "<f4"]]}, None),
        ({"pieces": [[0, 50, "<f4"], [40, 67, "<f4"]]}, None),
        ({"pieces": [[0, 118, "<f4"]]}, "twice"),
        ({"pieces": [[1 << 40, 1, "<f4"], [0, 116, "<f4"]]}, None),
        ({"pieces": [[0, 117, "<f8"]]}, "twice"),
        ({"pieces": [[0, 117, "|O"]]}, None),
        ({"pieces": [[0, 1 << 62, "<f4"]]}, None),
        ({"pieces": [[0, 0, "<f4"]] * 50_000}, None),
        ({}, b""),
    ],
)
def test_pieces_that_do_not_match_an_update(
    quick: Path, past: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], vector: Any
) -> None:
    clock = Clock(monkeypatch)
    name, _, good = records(past)
    size = sum(tensor.size for tensor in TENSORS)
    number = next(k for k, (_, header, _) in enumerate(good) if header["event"]["type"] == "update")
    index, header, whole = good[number]
    header["event"]["absent"] = []
    whole = np.ones(size, "<f4").tobytes()
    header["pieces"] = [[0, size, "<f4"]]
    given = 2 * whole if vector == "twice" else whole if vector is None else vector
    rewrite(past, name, [*good[:number], (index, header | change, given)])
    assert outcome(past, clock) == "refused"


ADAM = json.loads(msgspec.json.encode(Adam()))
FORGED_OPTIMIZERS: dict[str, Any] = {
    "of an unknown kind": ADAM | {"kind": "muon"},
    "of a kind that is no text": ADAM | {"kind": ["adam"]},
    "without a kind": {name: value for name, value in ADAM.items() if name != "kind"},
    "without a hyperparameter": {name: value for name, value in ADAM.items() if name != "beta1"},
    "with one hyperparameter more": ADAM | {"rho": 0.5},
    "with a text for a number": ADAM | {"lr": "0.1"},
    "with a truth value for a number": ADAM | {"lr": True},
    "with a number for a truth value": ADAM | {"maximize": 0},
    "with a number that is too large": ADAM | {"lr": 10**400},
    "out of range": ADAM | {"beta1": 1.0},
    "of another kind": json.loads(msgspec.json.encode(SGD())),
    "of a kind with the same hyperparameters": json.loads(msgspec.json.encode(AdamW())),
    "of another structure": ADAM | {"amsgrad": True},
    "that is a list": list(ADAM.values()),
    "that is nothing": None,
}
GROUPS_OF_RECORDS = {
    "update": ("event", "summary", "hyperparameters"),
    "settings": ("event", "settings", "groups"),
    "extension": ("event", "groups"),
}


@pytest.mark.parametrize("what", FORGED_OPTIMIZERS)
@pytest.mark.parametrize("kind", GROUPS_OF_RECORDS)
def test_an_optimizer_that_is_not_the_models_in_a_record(past: Path, kind: str, what: str) -> None:
    name, _, good = records(past)
    number = next(k for k, (_, header, _) in enumerate(good) if header["event"]["type"] == kind)
    index, header, vector = good[number]
    for optimizer, accepted in ((ADAM, True), (FORGED_OPTIMIZERS[what], False)):
        forged = changed(header, GROUPS_OF_RECORDS[kind], [optimizer])
        rewrite(past, name, [*good[:number], (index, forged, vector)])
        with nullcontext() if accepted else pytest.raises(CorruptError, match=name):
            read(past)


@pytest.mark.parametrize("what", FORGED_OPTIMIZERS)
@pytest.mark.parametrize("place", ["settings", "initial_settings", "next_settings", "updates"])
def test_an_optimizer_that_is_not_the_models_in_a_manifest(past: Path, place: str, what: str) -> None:
    folder = past / "models" / "m"
    name = max(folder.glob("snapshot-*.json")).name
    for older in list(folder.glob("snapshot-*")):
        if older.stem != name.removesuffix(".json"):
            older.unlink()
    good = json.loads((folder / name).read_bytes()[:-10])
    good["model"]["next_settings"] = good["model"]["settings"]
    path = ("updates", 0, "hyperparameters", 0) if place == "updates" else (place, "groups", 0)
    for optimizer, accepted in ((ADAM, True), (FORGED_OPTIMIZERS[what], False)):
        (folder / name).write_bytes(signed(changed(good, ("model", *path), optimizer)))
        with nullcontext() if accepted else pytest.raises(CorruptError, match=name):
            read(past)


def test_a_directory_of_another_version_is_refused_by_name(past: Path) -> None:
    for manifest in (past / "models" / "m").glob("snapshot-*.json"):
        good = json.loads(manifest.read_bytes()[:-10])
        manifest.write_bytes(signed(good | {"format": "deltaserve snapshot 2"}))
    with pytest.raises(
        CorruptError, match="another version of deltaserve wrote it: its format is deltaserve snapshot 2"
    ):
        read(past)


@pytest.mark.parametrize("wrong", ["negative", "NaN", "infinite", "one vector fewer", "one vector more"])
def test_a_state_that_the_optimizer_cannot_have(past: Path, wrong: str) -> None:
    name, _, good = records(past)
    number = next(k for k, (_, header, _) in enumerate(good) if header["event"]["type"] == "state")
    index, header, vector = good[number]
    size = header["pieces"][0][1]
    vectors = np.frombuffer(vector, "<f4").reshape(3, size).copy()
    vectors[1] = -1.0  # a moment may be negative, a second moment may not
    rewrite(past, name, [*good[:number], (index, header, vectors.tobytes())])
    assert read(past)
    count = {"one vector fewer": 2, "one vector more": 4}.get(wrong, 3)
    vectors = np.resize(vectors, (count, size))
    if count == 3:
        vectors[2, 5] = {"negative": -1e-30, "NaN": np.nan, "infinite": np.inf}[wrong]
    pieces = {"pieces": [[0, size, "<f4"]] * count}
    rewrite(past, name, [*good[:number], (index, header | pieces, vectors.tobytes())])
    with pytest.raises(CorruptError, match=name):
        read(past)


@pytest.mark.parametrize("kind", ["snapshot-00000009.json", HEAD])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n00000000\n",
        signed(b""),
        signed(b"null"),
        signed(b"[" * 100_000 + b"]" * 100_000),
        signed(b'{"format":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        signed(b'{"x":' + b"{" * 5000),
        signed(b'{"number":' + b"9" * 5000 + b"}"),
        signed(b'{"bytes":1e999}'),
        signed(b"\xff\xfe{}"),
        signed(b'{"format":"\\ud800"}'),
        signed(b"NaN"),
        signed(b"cos\nsystem\n(S'true'\ntR."),
        signed(b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."),
        b"x" * 100,
        bytes(1 << 20),
    ],
    ids=lambda content: repr(content[:24]),
)
def test_a_small_file_of_nonsense(
    quick: Path, past: Path, monkeypatch: pytest.MonkeyPatch, kind: str, content: bytes
) -> None:
    clock = Clock(monkeypatch)
    (past / "models" / "m" / kind).write_bytes(content)
    if kind == HEAD:
        assert outcome(past, clock) == "refused"
    else:
        assert outcome(past, clock) == "of use", "the snapshot before and its journals are there"


def test_a_manifest_that_claims_huge_tensors(quick: Path, past: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of a tebibyte takes no space."""
    clock, folder = Clock(monkeypatch), past / "models" / "m"
    name = max(folder.glob("snapshot-*.json")).name
    for older in list(folder.glob("snapshot-*")):
        if older.stem != name.removesuffix(".json"):
            older.unlink()
    good = json.loads((folder / name).read_bytes()[:-10])
    good["model"]["tensors"] = [{"name": "w", "shape": [1 << 20, 1 << 15], "group": 0}]
    good["model"]["update_counts"] = [0]
    head = snapshot._tensors_header(unpacked(signed(good), Manifest, "m").model, good["index"])
    good["bytes"] = len(head) + (1 + len(Adam().slots)) * 4 * (1 << 35)
    (folder / name).write_bytes(signed(good))
    assert outcome(past, clock) == "refused", "the file is not as long"


def test_file_names_that_do_not_belong_to_a_model_are_ignored(
    quick: Path, past: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, folder = Clock(monkeypatch), past / "models" / "m"
    for name in (
        "snapshot-1.json",
        "snapshot-xxxxxxxx.json",
        "journal-٠٠٠٠٠٠٠٩",
        "journal-00000099.txt",
        ".hidden",
        "note",
    ):
        (folder / name).write_bytes(b"x")
    (folder / "unfinished.new").write_bytes(b"x")
    assert outcome(past, clock) == "of use"
    assert not (folder / "unfinished.new").exists()


def test_a_model_in_the_folder_of_another_is_refused(quick: Path, past: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise two folders could claim to be the same model."""
    (past / "models" / "m").rename(past / "models" / "other")
    host = ModelHost(past)
    try:
        with pytest.raises(CorruptError, match="model m"):
            host.restore("other")
    finally:
        host.die()
