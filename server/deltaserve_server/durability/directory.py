"""The data directory of a server: a folder for each model, and a lock that keeps other servers out.

lock
models/NAME/              see `folder`
models/.NAME.RANDOM.new   a model that is being created or deleted
"""

import fcntl
import os
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deltaserve_server.durability import snapshot
from deltaserve_server.durability.errors import DataDirectoryError, disk_full_advice
from deltaserve_server.durability.files import UNFINISHED, Files
from deltaserve_server.durability.folder import Folder, Head
from deltaserve_server.durability.model_storage import Clock, Durability, ModelStorage, Schedule, StoredModel
from deltaserve_server.memory import State
from deltaserve_server.model import Machine
from deltaserve_server.model.state import MachineState

_OWNER = 0o700


@dataclass(frozen=True, slots=True)
class Prepared:
    """The folder of a new model, under a temporary name, and what it contains."""

    path: Path
    stored: StoredModel

    def discard(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.path, ignore_errors=True)


class DataDirectory:
    """A data directory, created if it does not exist and locked until `close`.

    Raises:
        DataDirectoryError: The directory cannot be used, or another server uses it.
    """

    def __init__(self, path: Path, schedule: Schedule, clock: Clock = time) -> None:
        self.path = path
        self._schedule = schedule
        self._clock = clock
        self._models = path / "models"
        self._owner = os.getpid()
        try:
            missing = [folder for folder in (self._models, *self._models.parents) if not folder.exists()]
            self._models.mkdir(mode=_OWNER, parents=True, exist_ok=True)
            for folder in missing:  # a new folder survives a power failure once its parent is synced
                Files(folder.parent).sync()
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._error(error) from error
        try:
            self._take_lock()
            with suppress(OSError):
                for leftover in self._models.glob(f".*{UNFINISHED}"):  # a crash interrupted the creation or deletion
                    shutil.rmtree(leftover, ignore_errors=True)
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def durability(self) -> Durability:
        """What survives."""
        return self._schedule.durability

    def names(self) -> list[str]:
        """Returns the names of all models, sorted."""
        return sorted(path.name for path in self._models.iterdir() if path.is_dir() and not path.name.startswith("."))

    def folder(self, name: str) -> Folder:
        """Returns the folder of a model."""
        return Folder(Files(self._models / name))

    def storage(self, name: str, stored: StoredModel) -> ModelStorage:
        """Starts to keep a model durable; raises OSError if its folder cannot be written."""
        return ModelStorage(self.folder(name), self._schedule, stored, self._clock)

    def prepare(self, machine: Machine, state: State) -> Prepared:
        """Writes the first snapshot of a new model, under a temporary name; raises OSError if it cannot."""
        path = self._models / f".{machine.name}.{secrets.token_hex(4)}{UNFINISHED}"
        path.mkdir(mode=_OWNER)
        try:
            files, head = Files(path), Head.new()
            journal = 2 if self._schedule.durability.journals else None
            entry = snapshot.write(files, 1, self._clock.time(), 0, journal, MachineState.of(machine), state)
            Folder(files).write_head(head)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return Prepared(path, StoredModel(head=head, last=entry))

    def add(self, prepared: Prepared, name: str) -> ModelStorage:
        """Gives a new model its name, durably; raises OSError if it cannot, or if the name is taken."""
        prepared.path.rename(self._models / name)  # fails if the name is taken: that folder is not empty
        try:
            Files(self._models).sync()
            return self.storage(name, prepared.stored)
        except BaseException:
            (self._models / name).rename(prepared.path)  # a temporary name again: the next start would remove it
            raise

    def remove(self, name: str) -> None:
        """Deletes a model, durably; raises OSError if it cannot.

        The rename decides: a crash leaves either the model or a folder that the next start removes.
        """
        deleted = self._models / f".{name}.{secrets.token_hex(4)}{UNFINISHED}"
        (self._models / name).rename(deleted)
        try:
            Files(self._models).sync()
        except OSError:
            deleted.rename(self._models / name)
            raise
        shutil.rmtree(deleted, ignore_errors=True)

    def set_aside(self, name: str) -> Path:
        """Renames the folder of a corrupt model, so that the name is free; returns the new path."""
        aside = self._models / f".{name}.{secrets.token_hex(4)}.corrupt"
        (self._models / name).rename(aside)
        Files(self._models).sync()
        return aside

    def close(self) -> None:
        """Releases the lock. A second call does nothing."""
        lock, self._lock = self._lock, -1
        if lock < 0:
            return
        try:
            # A forked child shares the lock: it must neither keep it when the parent closes nor release it itself.
            if os.getpid() == self._owner:
                fcntl.flock(lock, fcntl.LOCK_UN)
        finally:
            os.close(lock)

    def _take_lock(self) -> None:
        """Locks the directory. The kernel releases a flock when the process ends, however it ends."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            raise DataDirectoryError(
                f"data directory {self.path} is in use by another server (process {owner}): give each its own"
            ) from None
        try:
            # The process id is for the error message above; only the lock counts.
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> DataDirectoryError:
        advice = disk_full_advice(error, self.path)
        return DataDirectoryError(f"data directory {self.path}: {error.strerror}{advice}")
