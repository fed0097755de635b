"""G4: recovery detects every cut or changed file; it returns everything or an error that names the file.

DELTASERVE_FULL=1 cuts at every byte and flips 10,000 bits.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from damage import KINDS, Left, Verdicts, leave
from model_host import read

from deltaserve_server.durability import folder, journal
from deltaserve_server.durability.errors import CorruptError


@pytest.fixture(scope="module", params=["fsync", pytest.param("journal", marks=pytest.mark.deep)])
def left(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Left]:
    """The data directory of a killed server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "_ALLOCATED", 1 << 16)
        memory = Path("/dev/shm")
        import shutil
        import tempfile

        path = Path(tempfile.mkdtemp(dir=memory)) if memory.is_dir() else tmp_path_factory.mktemp("left")
        yield leave(path, request.param)
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def verdicts(left: Left) -> Iterator[Verdicts]:
    """Judges trials and prints their counts."""
    made = Verdicts(left)
    yield made
    print(f"\n{sum(made.counts.values())} trials: {dict(made.counts)}")


def test_an_undamaged_directory_recovers_everything(left: Left) -> None:
    assert read(left.path) == left.history[-1]
    assert [len(left.names(kind)) for kind in KINDS] == [2, 2, 1, 2]
    assert all(old.version <= new.version for old, new in zip(left.history, left.history[1:], strict=False))


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_detected(left: Left, verdicts: Verdicts, kind: str, full: bool) -> None:
    chance = random.Random(f"flips of {kind}")
    for _ in range(1250 if full else 60):
        name = chance.choice(left.names(kind))
        content = bytearray(left.files[name])
        inside = left.used + 128 if kind == "journal" and chance.random() < 0.9 else len(content)
        content[chance.randrange(min(inside, len(content)))] ^= 1 << chance.randrange(8)
        verdicts.judge(name, bytes(content))
    assert not verdicts.counts["shorter"]
    assert kind not in ("head", "journal") or verdicts.counts["named"]
    assert kind in ("head", "journal") or not verdicts.counts["named"], (
        "the snapshot before and its journal recover everything"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_is_detected(left: Left, verdicts: Verdicts, kind: str, full: bool) -> None:
    chance = random.Random(f"cuts of {kind}")
    for name in left.names(kind):
        size = len(left.files[name])
        inside = min(left.used + 64, size) if kind == "journal" else size
        cuts = {0, 1, 63, 64, 65, size - 1, *range(0, size, 4096)}
        cuts |= set(range(inside)) if full else {chance.randrange(inside) for _ in range(40)}
        for cut in sorted(cut for cut in cuts if 0 <= cut < size):
            verdicts.judge(name, left.files[name][:cut])
    assert (kind in ("head", "journal")) == (verdicts.counts["named"] > 0)


def test_a_journal_shortened_by_a_power_failure_recovers_its_prefix(
    left: Left, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a power failure can shorten a file."""
    monkeypatch.setattr(folder, "boot", lambda: "another")
    if b'"fsync"' not in left.files["head.json"]:
        pytest.skip("without fsync the loss of power is one of sessions too")
    name = max(left.names("journal"))
    found = []
    for cut in range(64, left.used + 256, 64 if full else 256):
        with left.damaged(name, left.files[name][:cut]):
            found.append(left.history.index(read(left.path)))
    assert found == sorted(found)
    assert found[-1] == len(left.history) - 1
    assert len(set(found)) > 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_detected(left: Left, verdicts: Verdicts, kind: str) -> None:
    for name in left.names(kind):
        verdicts.judge(name, None)
    assert (kind in ("head", "journal")) == (verdicts.counts["named"] > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_garbage_in_a_file_is_detected(left: Left, verdicts: Verdicts, kind: str, full: bool) -> None:
    chance = random.Random(f"garbage in {kind}")
    for _ in range(600 if full else 40):
        name = chance.choice(left.names(kind))
        content = bytearray(left.files[name])
        length = chance.choice((1, 2, 8, 64, 512, 4096))
        start = chance.randrange(min(left.used if kind == "journal" else len(content), len(content)))
        content[start : start + length] = chance.randbytes(min(length, len(content) - start))
        verdicts.judge(name, bytes(content))
    assert not verdicts.counts["shorter"]


@pytest.mark.parametrize("kind", ["tensors", "manifest", "journal"])
def test_damage_of_older_files_is_detected_when_the_newest_snapshot_is_gone(
    left: Left, verdicts: Verdicts, kind: str, full: bool
) -> None:
    """Recovery then needs the snapshot before and both journals that continue it."""
    chance = random.Random(f"older {kind}")
    gone = left.names("manifest")[-1]
    name = left.names(kind)[0]
    (left.folder / gone).unlink()
    try:
        assert read(left.path) == verdicts.full
        for _ in range(1000 if full else 60):
            content = bytearray(left.files[name])
            place = chance.randrange(len(content))
            if chance.random() < 0.5:
                content[place] ^= 1 << chance.randrange(8)
            else:
                del content[place:]
            verdicts.judge(name, bytes(content), also=left.names("journal")[-1])
    finally:
        (left.folder / gone).write_bytes(left.files[gone])
    assert verdicts.counts["named"] > 0.9 * sum(verdicts.counts.values())


@pytest.mark.parametrize("power", [False, True])
def test_a_sector_of_zeros_costs_at_most_unacknowledged_records(
    left: Left, verdicts: Verdicts, monkeypatch: pytest.MonkeyPatch, power: bool
) -> None:
    """Zeros in the last record are a torn write; elsewhere they hide a record that a later one calls durable.

    A zeroed sector with the end of one record and the start of the last destroys both. A real disk would leave the old
    content of that sector, so this is stricter than needed.
    """
    name = max(left.names("journal"))
    if power:
        monkeypatch.setattr(folder, "boot", lambda: "another")
        if b'"fsync"' not in left.files["head.json"]:
            pytest.skip("without fsync the loss of power is one of sessions too")
    for start in range(0, left.used, 512):
        content = bytearray(left.files[name])
        content[start : start + 512] = bytes(512)
        hit = sum(end > start for end in left.ends)
        last = left.history[-1 - hit :] if start + 512 > left.ends[-2] else []
        verdicts.judge(name, bytes(content), last.__contains__)
    assert verdicts.counts["named"] > 2 * verdicts.counts["shorter"]


@pytest.mark.parametrize("block", [512, 4096])
def test_exchanged_blocks_are_detected(left: Left, verdicts: Verdicts, block: int) -> None:
    chance = random.Random(block)
    for name in [name for kind in ("tensors", "journal") for name in left.names(kind)]:
        whole = left.files[name]
        blocks = [whole[at : at + block] for at in range(0, len(whole.rstrip(b"\0")), block)]
        for _ in range(20):
            mixed = blocks[:]
            one, other = chance.randrange(len(blocks)), chance.randrange(len(blocks))
            mixed[one], mixed[other] = mixed[other], mixed[one]
            content = b"".join(mixed)
            verdicts.judge(name, content + whole[len(content) :])
    assert not verdicts.counts["shorter"]


def test_files_of_another_snapshot_are_detected(left: Left, verdicts: Verdicts) -> None:
    for kind in ("tensors", "manifest"):
        older, newer = left.names(kind)
        verdicts.judge(newer, left.files[older])
        verdicts.judge(older, left.files[newer])
    older, newer = left.names("journal")
    with pytest.raises(CorruptError, match="is missing"), left.damaged(newer, left.files[older]):
        read(left.path)


def test_two_corrupt_snapshots_are_an_error(left: Left) -> None:
    older, newer = left.names("tensors")
    with left.damaged(older, left.files[older][:-1]):
        content = bytearray(left.files[newer])
        content[-1] ^= 1
        (left.folder / newer).write_bytes(content)
        try:
            with pytest.raises(CorruptError, match=newer):
                read(left.path)
        finally:
            (left.folder / newer).write_bytes(left.files[newer])
