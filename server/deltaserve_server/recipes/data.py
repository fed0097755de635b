"""The data of the recipes, as float32 arrays in memory."""

import hashlib
import os
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve_server.recipes.errors import DataError, MissingPackageError

AIRFOIL_FILE = "airfoil_self_noise.dat"
AIRFOIL_SHA1 = "76e5be1548fd8222e5074cf0faae75edff8cf93f"
AIRFOIL_URL = "http://d2l-data.s3-accelerate.amazonaws.com/airfoil_self_noise.dat"
AIRFOIL_COLUMNS = 6
AIRFOIL_EXAMPLES = 1500
HOW_TO_GIVE_THE_FILE = "give the file with --data FILE or DELTASERVE_DATA=FILE"


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Features (n, d), float32, and labels (n,): float32 in a regression, class numbers (int64) otherwise."""

    features: NDArray[np.float32]
    labels: NDArray[Any]

    def __len__(self) -> int:
        return len(self.labels)


def load_digits() -> tuple[Examples, Examples]:
    """Reads the 8 x 8 digits that ship with scikit-learn and splits them, the same way every time.

    Returns:
        1437 training and 360 test examples, features in [0, 1], each digit in both parts in its share.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets, model_selection
    except ModuleNotFoundError as error:
        raise MissingPackageError("scikit-learn", "train") from error
    bunch = datasets.load_digits()
    features, labels = (bunch.data / 16.0).astype(np.float32), bunch.target.astype(np.int64)
    train, test = model_selection.train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    return (
        Examples(features=features[train], labels=labels[train]),
        Examples(features=features[test], labels=labels[test]),
    )


def load_airfoil(file: Path) -> Examples:
    """Reads the airfoil file as the book does: standardised over all rows, label included, then the first 1500 rows.

    Raises:
        DataError: the file cannot be read or has another form.
    """
    table = _read_table(file)
    spread = table.std(axis=0)
    if not spread.all():
        raise DataError(f"{file} is not the airfoil data: a column never changes")
    table = ((table - table.mean(axis=0)) / spread)[:AIRFOIL_EXAMPLES]
    return Examples(features=np.ascontiguousarray(table[:, :-1]), labels=np.ascontiguousarray(table[:, -1]))


def _read_table(file: Path) -> NDArray[np.float32]:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
        table = np.array([line.split("\t") for line in lines], dtype=np.float32)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file} is not the airfoil data: expected 6 columns of numbers with tabs between") from error
    if table.shape != (len(lines), AIRFOIL_COLUMNS) or not np.isfinite(table).all():
        raise DataError(f"{file} is not the airfoil data: expected 6 columns of finite numbers")
    return table


def find_airfoil(given: Path | None, cache: Path, url: str = AIRFOIL_URL) -> Path:
    """Finds the airfoil file: what the user gave, else the cache, else a download into the cache.

    Args:
        given: A file, or a folder that holds `airfoil_self_noise.dat`. None means that the user gave nothing.
        cache: Folder for the download; made if it is missing.
        url: Where to download from.

    Raises:
        DataError: there is no such file, or the download failed or gave other bytes.
    """
    if given is not None:
        return _given_file(given)
    file = cache / AIRFOIL_FILE
    if not (file.is_file() and _is_airfoil(file.read_bytes())):
        _write_whole(file, _download(url))
    return file


def _given_file(given: Path) -> Path:
    file = given / AIRFOIL_FILE if given.is_dir() else given
    if not file.is_file():
        raise DataError(f"no file {file}: {HOW_TO_GIVE_THE_FILE}")
    return file


def _is_airfoil(content: bytes) -> bool:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest() == AIRFOIL_SHA1


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310  (a constant address)
            content: bytes = response.read(1 << 20)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot download the airfoil data: {HOW_TO_GIVE_THE_FILE} ({AIRFOIL_FILE})") from error
    if not _is_airfoil(content):
        raise DataError(f"the download of {AIRFOIL_FILE} gave other bytes than expected: {HOW_TO_GIVE_THE_FILE}")
    return content


def _write_whole(file: Path, content: bytes) -> None:
    """Writes by rename, so that a second run never reads half a file."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        Path(temporary).replace(file)
    except OSError as error:
        raise DataError(f"cannot write to the cache {file.parent}: {HOW_TO_GIVE_THE_FILE}") from error
