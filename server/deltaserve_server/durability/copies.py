"""Copies of snapshots at another place, an object store for instance: anything that fsspec knows by its URL.

They have the names that they have here, so a data directory is made of them by copying them back.
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

_KEPT = 2
_MANIFEST = re.compile(r"snapshot-(\d{8,})\.json", re.ASCII)
_RETRY_SECONDS = (1.0, 5.0, 25.0)


class Copies:
    """Copies the newest snapshot of every model, in a thread of its own, one after the other.

    Args:
        url: A folder, as s3://bucket/path or file:///path; what a file system of fsspec needs beside it, it takes from
            the environment or from fsspec's configuration.

    Raises:
        ValueError: fsspec does not know the URL, or lacks a package for it.
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
        """Has a model's newest snapshot copied, as of when its turn comes."""
        with self._lock:
            self._waiting[model] = folder
        self._wake.put(True)

    def close(self, timeout_seconds: float) -> None:
        """Copies what waits, then ends; whatever is not done in time is left."""
        self._closed.set()
        self._wake.put(False)
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            _log.warning("copies: not everything was copied to %s", self._url)

    def _run(self) -> None:
        going_on = True
        while going_on:
            going_on = self._wake.get()
            with self._lock:
                waiting, self._waiting = self._waiting, {}
            for model, folder in waiting.items():
                self._copy_for_sure(model, folder)

    def _copy_for_sure(self, model: str, folder: Folder) -> None:
        """Copies the newest snapshot; tries again where that fails, with the one that is the newest by then."""
        for seconds in (*_RETRY_SECONDS, None):
            try:
                with folder.newest() as number:
                    copied = self._copy(model, folder, number)
            except Exception as error:
                if _is_gone(folder):
                    return
                _log.warning("copies: the newest snapshot of model %s was not copied: %s", model, error)
                if seconds is None or self._closed.wait(seconds):
                    return
            else:
                if copied:
                    _log.info("copies: snapshot %d of model %s is at %s", number, model, self._url)
                return

    def _copy(self, model: str, folder: Folder, number: int) -> bool:
        """Copies a snapshot; returns False where it is there already."""
        models, head = f"{self._root.rstrip('/')}/models", folder.read_head()
        target = f"{models}/{model}"
        other = self._lineage(target)
        if other is not None and not head.knows(other):  # a model that once had this name
            self._system.mv(target, f"{models}/.{model}.{other.hex()}", recursive=True)
        self._system.makedirs(target, exist_ok=True)
        # Who puts it back has an older state than somebody may have been told of.
        self._place(f"{target}/{HEAD}", packed(head.mark_uncertain()))
        tensors, name = snapshot.tensors_name(number), snapshot.manifest_name(number)
        manifest = folder.files.read(name)
        self._tidy(target, sys.maxsize)  # what an attempt has left that failed takes space
        there = name in self._names(target)
        if there and self._system.cat_file(f"{target}/{name}") == manifest:
            return False
        if there:  # of a course that was left: without it nobody takes what is written next for a whole snapshot
            self._system.rm_file(f"{target}/{name}")
        self._system.put_file(str(folder.files.folder / tensors), f"{target}/{tensors}")
        self._place(f"{target}/{name}", manifest)  # the last: without it a snapshot is none
        self._tidy(target, number)
        return True

    def _place(self, path: str, content: bytes) -> None:
        """Puts a small file there, whole or not at all."""
        self._system.pipe_file(path + UNFINISHED, content)
        self._system.mv(path + UNFINISHED, path)

    def _tidy(self, target: str, number: int) -> None:
        """Removes all but the last two snapshots up to a number: later ones are of a course that was left."""
        names = self._names(target)
        found = sorted((int(match[1]), name) for name in names if (match := _MANIFEST.fullmatch(name)))
        kept = [name for found_number, name in found if found_number <= number][-_KEPT:]
        whole = {HEAD, *kept, *(name.replace(".json", ".safetensors") for name in kept)}
        for name in sorted(set(names) - whole, key=lambda name: not name.endswith(".json")):  # a manifest comes first
            self._system.rm_file(f"{target}/{name}")

    def _lineage(self, target: str) -> bytes | None:
        """Returns the lineage of the copies that are there; None where there are none."""
        try:
            return unpacked(self._system.cat_file(f"{target}/{HEAD}"), Head, f"{target}/{HEAD}").lineage
        except FileNotFoundError:
            return None
        except CorruptError:
            return secrets.token_bytes(LINEAGE_BYTES)

    def _names(self, target: str) -> list[str]:
        found: list[Any] = self._system.ls(target, detail=False)
        return [str(path).rsplit("/", 1)[-1] for path in found]


def _is_gone(folder: Folder) -> bool:
    """Whether the model was deleted."""
    try:
        folder.files.names()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False
