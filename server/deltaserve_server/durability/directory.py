"""A server's data directory: a folder for each model, and a lock that keeps other servers out.

lock
models/NAME/              see `folder`
models/.NAME.CHANCE.new   a model that is being made, or removed
"""

import fcntl
import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

from deltaserve_server.durability import snapshot
from deltaserve_server.durability.errors import DataDirectoryError
from deltaserve_server.durability.files import UNFINISHED, Files
from deltaserve_server.durability.folder import Folder, Head
from deltaserve_server.durability.model_storage import Durability, ModelStorage, Schedule, StoredModel
from deltaserve_server.memory import State
from deltaserve_server.model import Machine
from deltaserve_server.model.state import MachineState

_OWNER = 0o700


class Prepared:
    """A new model's folder that does not have its name yet."""

    def __init__(self, path: Path, kept: StoredModel) -> None:
        self.path = path
        self.kept = kept

    def discard(self) -> None:
        """Removes it."""
        shutil.rmtree(self.path, ignore_errors=True)


class DataDirectory:
    """A data directory that is this server's until `close`.

    Args:
        path: Where; it is made if it is not there.
        schedule: How models are kept safe.

    Raises:
        DataDirectoryError: It cannot be used, or another server uses it.
    """

    def __init__(self, path: Path, schedule: Schedule) -> None:
        self.path = path
        self._schedule = schedule
        self._models = path / "models"
        self._owner = os.getpid()
        try:
            self._make()
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DataDirectoryError(f"data directory {path}: {error.strerror}") from error
        try:
            self._take_lock()
            self._tidy()
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def durability(self) -> Durability:
        """What survives."""
        return self._schedule.durability

    def names(self) -> list[str]:
        """Returns the names of all models in it."""
        return sorted(path.name for path in self._models.iterdir() if path.is_dir() and not path.name.startswith("."))

    def folder(self, name: str) -> Folder:
        """Returns a model's folder."""
        return Folder(Files(self._models / name))

    def storage(self, name: str, kept: StoredModel) -> ModelStorage:
        """Returns what keeps a model safe from now on; raises OSError where it cannot be written."""
        return ModelStorage(self.folder(name), self._schedule, kept)

    def prepare(self, machine: Machine, state: State) -> Prepared:
        """Writes a new model's first snapshot; raises OSError where that is not possible."""
        path = self._models / f".{machine.name}.{secrets.token_hex(4)}{UNFINISHED}"
        path.mkdir(mode=_OWNER)
        try:
            files, head = Files(path), Head.new()
            follows = 2 if self._schedule.durability.journals else None
            entry = snapshot.write(files, 1, time.time(), 0, follows, MachineState.of(machine), state)
            Folder(files).write_head(head)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return Prepared(path, StoredModel(head=head, last=entry))

    def add(self, prepared: Prepared, name: str) -> ModelStorage:
        """Gives a new model its name, for good; raises OSError where one of this name is there."""
        prepared.path.rename(self._models / name)
        try:
            Files(self._models).sync()
            return self.storage(name, prepared.kept)
        except BaseException:
            (self._models / name).rename(prepared.path)
            raise

    def remove(self, name: str) -> None:
        """Forgets a model, for good; raises OSError where that is not possible."""
        gone = self._models / f".{name}.{secrets.token_hex(4)}{UNFINISHED}"
        (self._models / name).rename(gone)
        try:
            Files(self._models).sync()
        except OSError:
            gone.rename(self._models / name)
            raise
        shutil.rmtree(gone, ignore_errors=True)

    def set_aside(self, name: str) -> Path:
        """Keeps a model's folder under another name, which no model has; returns it."""
        aside = self._models / f".{name}.{secrets.token_hex(4)}.corrupt"
        (self._models / name).rename(aside)
        Files(self._models).sync()
        return aside

    def close(self) -> None:
        """Lets others use it; once."""
        lock, self._lock = self._lock, -1
        if lock < 0:
            return
        try:
            # A process that was forked meanwhile holds it too: it must not keep it, nor take it from this one.
            if os.getpid() == self._owner:
                fcntl.flock(lock, fcntl.LOCK_UN)
        finally:
            os.close(lock)

    def _make(self) -> None:
        """Makes the folders that are not there, for good."""
        made = [folder for folder in (self._models, *self._models.parents) if not folder.exists()]
        self._models.mkdir(mode=_OWNER, parents=True, exist_ok=True)
        for folder in made:
            Files(folder.parent).sync()

    def _take_lock(self) -> None:
        """Makes it ours: the lock goes with the process, however that ends."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            raise DataDirectoryError(
                f"data directory {self.path} is in use by another server (process {owner}): give each its own"
            ) from None
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise DataDirectoryError(f"data directory {self.path} cannot be written to: {error.strerror}") from error

    def _tidy(self) -> None:
        """Removes what was being made or removed when a server died."""
        with suppress(OSError):
            for path in self._models.iterdir():
                if path.name.startswith(".") and path.name.endswith(UNFINISHED):
                    shutil.rmtree(path, ignore_errors=True)
