"""Copies snapshots to another place, for example an object store: any file system that fsspec knows by URL.

The copies keep their file names, so copying them back makes a data directory.
"""

import logging
import queue
import re
import secrets
import sys
import threading
from typing import Any

from deltaserve_server.durability import snapshot
from deltaserve_server.durability.checked import packed, unpacked
from deltaserve_server.durability.errors import CorruptError
from deltaserve_server.durability.files import UNFINISHED
from deltaserve_server.durability.folder import HEAD, LINEAGE_BYTES, Folder, Head

_log = logging.getLogger(__name__)

_COPIES_KEPT = 2
_MANIFEST = re.compile(r"snapshot-(\d{8,})\.json", re.ASCII)
_RETRY_SECONDS = (1.0, 5.0, 25.0)


class Copies:
    """Copies the newest snapshot of each model, one after the other, in a thread of its own.

    Args:
        url: The destination folder, such as s3://bucket/path or file:///path. fsspec takes credentials and options from
            the environment or its own configuration.

    Raises:
        ValueError: fsspec does not know the URL, or a package for it is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self._system, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"copies: {url}: {error}") from None
        self._url = url
        self._waiting: dict[str, Folder] = {}
        self._lock = threading.Lock()
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="copies", daemon=True)
        self._thread.start()

    def offer(self, model: str, folder: Folder) -> None:
        """Requests a copy of a model's newest snapshot. It is chosen when the copy starts, not now."""
        with self._lock:
            self._waiting[model] = folder
        self._wake.put(True)

    def close(self, timeout_seconds: float) -> None:
        """Finishes the requested copies and stops, or gives up after the timeout."""
        self._closed.set()
        self._wake.put(False)
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            _log.warning("copies: not everything was copied to %s in time", self._url)

    def _run(self) -> None:
        running = True
        while running:
            running = self._wake.get()
            with self._lock:  # several wake-ups may have been for one model: the later ones find nothing
                waiting, self._waiting = self._waiting, {}
            for model, folder in waiting.items():
                self._copy_with_retries(model, folder)

    def _copy_with_retries(self, model: str, folder: Folder) -> None:
        """Copies the newest snapshot. A retry takes the one that is the newest by then."""
        for seconds in (*_RETRY_SECONDS, None):
            try:
                with folder.newest() as number:
                    copied = self._copy(model, folder, number)
            except Exception as error:  # an fsspec file system may raise anything
                if _is_deleted(folder):
                    return
                _log.warning("copies: the newest snapshot of model %s was not copied: %s", model, error)
                if seconds is None or self._closed.wait(seconds):
                    return
            else:
                if copied:
                    _log.info("copies: copied snapshot %d of model %s to %s", number, model, self._url)
                return

    def _copy(self, model: str, folder: Folder, number: int) -> bool:
        """Copies a snapshot; returns False if the destination has it already."""
        models, head = f"{self._root.rstrip('/')}/models", folder.read_head()
        target = f"{models}/{model}"
        lineage = self._lineage(target)
        if lineage is not None and not head.knows(lineage):  # copies of an earlier model of the same name
            self._system.mv(target, f"{models}/.{model}.{lineage.hex()}", recursive=True)
        self._system.makedirs(target, exist_ok=True)
        # A copy lacks the journal: a model restored from it may lack versions that a worker has seen.
        self._put(f"{target}/{HEAD}", packed(head.mark_uncertain()))
        tensors, name = snapshot.tensors_name(number), snapshot.manifest_name(number)
        manifest = folder.files.read(name)
        self._tidy(target, sys.maxsize)  # an attempt that failed may have left large files
        exists = name in self._names(target)
        if exists and self._system.cat_file(f"{target}/{name}") == manifest:
            return False
        if exists:  # of a lineage that was left; with its manifest, half-written tensors would pass for a snapshot
            self._system.rm_file(f"{target}/{name}")
        self._system.put_file(str(folder.files.folder / tensors), f"{target}/{tensors}")
        self._put(f"{target}/{name}", manifest)  # last: a snapshot exists if its manifest does
        self._tidy(target, number)
        return True

    def _put(self, path: str, content: bytes) -> None:
        """Writes a small file atomically."""
        self._system.pipe_file(path + UNFINISHED, content)
        self._system.mv(path + UNFINISHED, path)

    def _tidy(self, target: str, number: int) -> None:
        """Removes all files but the last two snapshots up to `number`; later ones belong to a lineage that was left."""
        names = self._names(target)
        found = sorted((int(match[1]), name) for name in names if (match := _MANIFEST.fullmatch(name)))
        manifests = [name for found_number, name in found if found_number <= number][-_COPIES_KEPT:]
        kept = {HEAD, *manifests, *(name.replace(".json", ".safetensors") for name in manifests)}
        for name in sorted(set(names) - kept, key=lambda name: not name.endswith(".json")):  # manifests first
            self._system.rm_file(f"{target}/{name}")

    def _lineage(self, target: str) -> bytes | None:
        """Returns the lineage of the copies at the destination; None if there are none."""
        try:
            return unpacked(self._system.cat_file(f"{target}/{HEAD}"), Head, f"{target}/{HEAD}").lineage
        except FileNotFoundError:
            return None
        except CorruptError:
            return secrets.token_bytes(LINEAGE_BYTES)  # unknown to every model, so the copies are moved aside

    def _names(self, target: str) -> list[str]:
        found: list[Any] = self._system.ls(target, detail=False)
        return [str(path).rsplit("/", 1)[-1] for path in found]


def _is_deleted(folder: Folder) -> bool:
    try:
        folder.files.names()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False
