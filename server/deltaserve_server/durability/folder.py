"""A model's folder: which snapshots and journals there are, and the head, which says how to take them.

    head.json                 the lineage, and how the model was last served
    snapshot-N.safetensors    see `snapshot`
    snapshot-N.json
    journal-N                 see `journal`

Numbers only grow. The last two snapshots stay, with one that is being copied, and the journals since the older of them.
"""

import logging
import re
import secrets
import threading
from collections.abc import Iterator, Sequence
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
_ANCESTORS = 64
_SNAPSHOT = re.compile(r"snapshot-(\d{8,})\.(safetensors|json)", re.ASCII)
_JOURNAL = re.compile(r"journal-(\d{8,})", re.ASCII)

LINEAGE_BYTES = 16


class Ancestor(msgspec.Struct, frozen=True):
    """A lineage that was left, and the last version that it has in common with the present one."""

    lineage: bytes
    version: int


class Served(msgspec.Struct, frozen=True):
    """How a model is served, or was until its server died.

    Attributes:
        durability: What survives.
        boot: Of the machine: another one says that it was started anew meanwhile.
        journal: Number of the journal that it was begun with; None where there is none.
    """

    durability: str
    boot: str
    journal: int | None = None

    @property
    def lost_power(self) -> bool:
        """Whether the machine may have been started anew since."""
        return not self.boot or self.boot != boot()


class Head(msgspec.Struct, frozen=True):
    """What is known of a model apart from its state.

    Attributes:
        lineage: Names the course that its versions have taken.
        ancestors: The lineages before, the newest last.
        served: None where its server ended in good order, its state safe.
        lost_at: Index of the last record that was there when the lineage before was left: all sessions ended there.
    """

    lineage: bytes
    ancestors: tuple[Ancestor, ...] = ()
    served: Served | None = None
    lost_at: int | None = None

    @classmethod
    def new(cls) -> "Head":
        """Returns the head of a new model."""
        return cls(secrets.token_bytes(LINEAGE_BYTES))

    def knows(self, lineage: bytes) -> bool:
        """Whether it is that of the model, now or before."""
        return lineage == self.lineage or any(lineage == one.lineage for one in self.ancestors)

    def mark_uncertain(self) -> "Head":
        """Returns this head for a folder that may lack what somebody was told of."""
        return msgspec.structs.replace(self, served=Served("snapshot", ""))

    def forked(self, version: int, index: int) -> "Head":
        """Returns the head of a model that goes on from `version` and record `index`, later ones being lost."""
        shared = (*self.ancestors, Ancestor(self.lineage, version))
        cut = tuple(Ancestor(one.lineage, min(one.version, version)) for one in shared)
        return Head(secrets.token_bytes(LINEAGE_BYTES), cut[-_ANCESTORS:], self.served, index)


def boot() -> str:
    """Returns what names this start of the machine; nothing where the system does not say."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


class Folder:
    """A model's folder.

    Args:
        files: What it holds.
    """

    def __init__(self, files: Files) -> None:
        self.files = files
        self._held: list[int] = []
        self._removing = threading.Lock()

    def snapshots(self) -> list[int]:
        """Returns the numbers of the snapshots that have a manifest, in ascending order."""
        return sorted(number for number, kind in self._snapshot_files() if kind == "json")

    def journals(self) -> list[int]:
        """Returns the numbers of the journals, in ascending order."""
        return sorted(int(found[1]) for name in self.files.names() if (found := _JOURNAL.fullmatch(name)))

    def next_number(self) -> int:
        """Returns a number that no file has had, whether it was finished or not."""
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
        """Puts a head in place, for good."""
        self.files.put(HEAD, [packed(head)])

    @contextmanager
    def newest(self) -> Iterator[int]:
        """Gives the number of the newest snapshot, which stays meanwhile, whatever comes after it.

        Raises:
            FileNotFoundError: The model is gone.
        """
        with self._removing:
            number = self.snapshots()[-1]
            self._held.append(number)
        try:
            yield number
        finally:
            self._held.remove(number)

    def tidy(self) -> None:
        """Removes what is not needed: all but the last two snapshots, and the journals since the older of them."""
        with self._removing:
            last = self.snapshots()[-_SNAPSHOTS_KEPT:]
            kept = {*last, *self._held}
            old = [snapshot.manifest_name(number) for number in self.snapshots() if number not in kept]
            old += [snapshot.tensors_name(n) for n, kind in self._snapshot_files() if kind != "json" and n not in kept]
            old += [journal_name(number) for number in self.journals() if number < self._first_journal(last)]
            for name in old:
                failpoint("snapshot.removing")
                self.files.remove(name)
        if old:
            self.files.sync()

    def set_aside(self, name: str, keep: int) -> None:
        """Keeps a corrupt journal, if it is there, under another name; its first `keep` bytes are good, and stay."""
        aside = f"{name}.corrupt"
        if keep:
            self.files.put(aside, [self.files.read(name)])
            self.files.shorten(name, keep, END, sync=True)
        elif name in self.files.names():
            self.files.rename(name, aside)  # as it is: the disk may be unable to read it
            self.files.sync()

    def clear(self) -> None:
        """Removes what was not finished."""
        for name in self.files.names():
            if name.endswith(UNFINISHED):
                self.files.remove(name)

    def entries(self) -> list[snapshot.Entry]:
        """Returns the snapshots that are good as far as their manifests tell, oldest first.

        Raises:
            OSError: One cannot be read, or the folder is gone.
        """
        listed = self.snapshots()
        found = []
        for number in listed:
            with suppress(CorruptError, FileNotFoundError):
                manifest = snapshot.read_manifest(self.files, number)
                size = manifest.bytes + self.files.size(snapshot.manifest_name(number))
                found.append(snapshot.Entry(number, manifest.model.version, size, manifest.taken_at))
        # Those that were removed meanwhile have made way for newer ones, or the model is gone.
        return found if self.snapshots() == listed else self.entries()

    def _first_journal(self, kept: Sequence[int]) -> int:
        """Returns the number of the first journal that one of these snapshots needs; of a bad one all are kept."""
        try:
            return min((snapshot.read_manifest(self.files, number).follows for number in kept), default=0)
        except (CorruptError, OSError) as error:
            _log.warning("%s", error)
            return 0

    def _snapshot_files(self) -> list[tuple[int, str]]:
        found = (_SNAPSHOT.fullmatch(name) for name in self.files.names())
        return [(int(match[1]), match[2]) for match in found if match]
