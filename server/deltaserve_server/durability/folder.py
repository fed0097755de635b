"""The folder of a model: its snapshots, its journals, and its head.

    head.json                 the model's lineage, and how it is served
    snapshot-N.safetensors    see `snapshot`
    snapshot-N.json
    journal-N                 see `journal`

Numbers only grow. The folder keeps the last two snapshots, any that is being copied, and the journals since the older
of the two: if the newest snapshot turns out to be corrupt, the older one and its journals lead to the same state.
"""

import logging
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from deltaserve._common.failpoints import failpoint
from deltaserve_server.durability import snapshot
from deltaserve_server.durability.checked import packed, unpacked
from deltaserve_server.durability.errors import CorruptError
from deltaserve_server.durability.files import UNFINISHED, Files
from deltaserve_server.durability.journal import END, journal_name

_log = logging.getLogger(__name__)

HEAD = "head.json"
_SNAPSHOTS_KEPT = 2
_ANCESTORS_MAX = 256
"""Also the number of starts after which a worker that was away takes the model for another one."""

_SNAPSHOT = re.compile(r"snapshot-(\d{8,})\.(safetensors|json)", re.ASCII)
_JOURNAL = re.compile(r"journal-(\d{8,})", re.ASCII)

LINEAGE_BYTES = 16


class Ancestor(msgspec.Struct, frozen=True):
    """An earlier lineage of a model, and the last version that it shares with the present one.

    Attributes:
        lineage: The lineage.
        version: The last version that the model still has of it.
        lossy: Whether records were lost, or may have been, when it was left. Then all sessions ended.
    """

    lineage: bytes
    version: int
    lossy: bool = False


class Served(msgspec.Struct, frozen=True):
    """How a server serves a model, or served it until it crashed.

    Attributes:
        durability: Name of the `Durability`.
        boot: Boot id of the machine; empty if unknown.
        journal: Number of the first journal of that server; None if it keeps none.
    """

    durability: str
    boot: str
    journal: int | None = None

    @property
    def lost_power(self) -> bool:
        """Whether the machine may have restarted since: then what was only in the page cache is gone."""
        return not self.boot or self.boot != boot()


class Head(msgspec.Struct, frozen=True):
    """What a folder says about a model apart from its state.

    A lineage names one run of a model's versions. Every start of a server begins a new one and records at which version
    the previous one was left. Only so can a worker tell that versions are lost when somebody puts a directory back from
    a backup: the restored directory cannot know of versions that were made after it was copied.

    Attributes:
        lineage: The present lineage, 16 random bytes.
        ancestors: The lineages before it, newest last.
        served: How the model is served; None after an orderly shutdown.
        lost_at: Index of the last record that was left when a recovery last lost records. All sessions ended there.
        inode: Inode number of the folder when the model was last served; a copy of the folder has another one.
    """

    lineage: bytes
    ancestors: tuple[Ancestor, ...] = ()
    served: Served | None = None
    lost_at: int | None = None
    inode: int | None = None

    @classmethod
    def new(cls) -> "Head":
        """Returns the head of a new model."""
        return cls(secrets.token_bytes(LINEAGE_BYTES))

    def knows(self, lineage: bytes) -> bool:
        """Returns whether a lineage is the present one or one of its ancestors."""
        return lineage == self.lineage or any(lineage == ancestor.lineage for ancestor in self.ancestors)

    def mark_uncertain(self) -> "Head":
        """Returns this head with a mark: the folder may lack versions, so the next recovery must end all sessions."""
        return msgspec.structs.replace(self, served=Served("snapshot", ""))

    def next_lineage(self, version: int, lost_at: int | None = None) -> "Head":
        """Returns the head of a new lineage.

        Args:
            version: The version at which the present lineage is left. Later versions are lost, in all lineages.
            lost_at: Index of the last record that is left, if records are or may be lost; None if none are.
        """
        lineages = (*self.ancestors, Ancestor(self.lineage, version, lossy=lost_at is not None))
        ancestors = [msgspec.structs.replace(one, version=min(one.version, version)) for one in lineages]
        return Head(
            secrets.token_bytes(LINEAGE_BYTES),
            tuple(ancestors[-_ANCESTORS_MAX:]),
            self.served,
            self.lost_at if lost_at is None else lost_at,
        )


def boot() -> str:
    """Returns the boot id of the machine, which changes with each restart; empty if the system has none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


class Folder:
    """The folder of a model."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self._being_copied: list[int] = []
        self._removing = threading.Lock()

    @property
    def inode(self) -> int:
        """Inode number of the folder."""
        return self.files.folder.stat().st_ino

    def snapshots(self) -> list[int]:
        """Returns the numbers of the snapshots, in ascending order."""
        return sorted(number for number, kind in self._snapshot_files() if kind == "json")

    def journals(self) -> list[int]:
        """Returns the numbers of the journals, in ascending order."""
        return sorted(int(found[1]) for name in self.files.names() if (found := _JOURNAL.fullmatch(name)))

    def next_number(self) -> int:
        """Returns a number above that of every file, finished or not."""
        # Unfinished and corrupt files count too: a number that was ever used must not name another snapshot.
        digits = (re.search(r"-(\d{8,})", name) for name in self.files.names())
        return max((int(found[1]) for found in digits if found), default=0) + 1

    def read_head(self) -> Head:
        """Returns the head.

        Raises:
            CorruptError: It is not what was written.
        """
        where = str(self.files.folder / HEAD)
        try:
            return unpacked(self.files.read(HEAD), Head, where)
        except FileNotFoundError:
            raise CorruptError(where, "it is missing") from None

    def write_head(self, head: Head) -> None:
        """Replaces the head, atomically and durably."""
        self.files.put(HEAD, [packed(head)])

    @contextmanager
    def newest(self) -> Iterator[int]:
        """Yields the number of the newest snapshot and keeps it from being removed meanwhile.

        Raises:
            FileNotFoundError: The model was deleted.
        """
        with self._removing:
            number = self.snapshots()[-1]
            self._being_copied.append(number)
        try:
            yield number
        finally:
            self._being_copied.remove(number)

    def tidy(self) -> None:
        """Removes snapshots before the last two, and the journals that neither of the two needs."""
        with self._removing:
            last = self.snapshots()[-_SNAPSHOTS_KEPT:]
            kept = {*last, *self._being_copied}
            # Manifests first: without one, nobody takes a half-removed snapshot for a whole one.
            old = [snapshot.manifest_name(number) for number in self.snapshots() if number not in kept]
            old += [snapshot.tensors_name(n) for n, kind in self._snapshot_files() if kind != "json" and n not in kept]
            try:
                first = min((snapshot.read_manifest(self.files, number).first_journal for number in last), default=0)
            except (CorruptError, OSError) as error:
                _log.warning("all journals are kept, because a snapshot cannot be read: %s", error)
                first = 0
            old += [journal_name(number) for number in self.journals() if number < first]
            for name in old:
                failpoint("snapshot.removing")
                self.files.remove(name)
        if old:
            self.files.sync()

    def set_aside(self, name: str, keep_bytes: int) -> None:
        """Keeps a copy of a corrupt journal, if it exists, under another name; its first good bytes stay in place."""
        aside = f"{name}.corrupt"
        if keep_bytes:
            self.files.put(aside, [self.files.read(name)])
            self.files.shorten(name, keep_bytes, END, sync=True)
        elif name in self.files.names():
            self.files.rename(name, aside)  # not copied: the disk may be unable to read it
            self.files.sync()

    def clear(self) -> None:
        """Removes files that a crash left unfinished."""
        for name in self.files.names():
            if name.endswith(UNFINISHED):
                self.files.remove(name)

    def entries(self) -> list[snapshot.Entry]:
        """Returns the snapshots whose manifests are good, oldest first.

        Raises:
            OSError: A manifest cannot be read, or the folder does not exist.
        """
        listed = self.snapshots()
        found = []
        for number in listed:
            # Checks manifests alone: the tensors may be gigabytes.
            with suppress(CorruptError, FileNotFoundError):
                manifest = snapshot.read_manifest(self.files, number)
                size = manifest.bytes + self.files.size(snapshot.manifest_name(number))
                found.append(snapshot.Entry(number, manifest.model.version, size, manifest.taken_at))
        # A snapshot that was removed meanwhile has made room for a newer one: list again.
        return found if self.snapshots() == listed else self.entries()

    def _snapshot_files(self) -> list[tuple[int, str]]:
        found = (_SNAPSHOT.fullmatch(name) for name in self.files.names())
        return [(int(match[1]), match[2]) for match in found if match]
