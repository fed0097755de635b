"""Loads the training data of the recipes as float32 arrays."""

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
GIVE_THE_FILE = "give the file with --data FILE or DELTASERVE_DATA=FILE"


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Features and labels.

    Attributes:
        features: Shape (n, d), float32.
        labels: Shape (n,): float32 for a regression, int64 class numbers for a classification.
    """

    features: NDArray[np.float32]
    labels: NDArray[Any]

    def __len__(self) -> int:
        return len(self.labels)


def load_digits() -> tuple[Examples, Examples]:
    """Loads the 8 x 8 digits that ship with scikit-learn, and splits them the same way every time.

    Returns:
        1437 training and 360 test examples, stratified by digit; features are in [0, 1].

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets, model_selection
    except ModuleNotFoundError as error:
        raise MissingPackageError("scikit-learn", "train") from error
    bunch = datasets.load_digits()
    features, labels = (bunch.data / 16.0).astype(np.float32), bunch.target.astype(np.int64)
    # Always the same split: accuracies of two runs can be compared, and a seed changes only the training.
    train, test = model_selection.train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    return (
        Examples(features=features[train], labels=labels[train]),
        Examples(features=features[test], labels=labels[test]),
    )


def load_airfoil(file: Path) -> Examples:
    """Loads the airfoil data as the book does: every column standardised over all rows, then the first 1500 rows.

    Raises:
        DataError: The file cannot be read, or does not have the format of the airfoil data.
    """
    try:
        lines = file.read_text(encoding="ascii").splitlines()
        table = np.array([line.split("\t") for line in lines], dtype=np.float32)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:  # not numbers, or rows of different lengths
        raise DataError(f"{file} is not the airfoil data: expected 6 columns of numbers, separated by tabs") from error
    if table.shape != (len(lines), AIRFOIL_COLUMNS) or not np.isfinite(table).all():
        raise DataError(f"{file} is not the airfoil data: expected 6 columns of finite numbers")
    spread = table.std(axis=0)
    if not spread.all():  # the next line would divide by 0
        raise DataError(f"{file} is not the airfoil data: a column has one value in all rows")
    table = ((table - table.mean(axis=0)) / spread)[:AIRFOIL_EXAMPLES]
    # A batch of rows is gathered at every step, which is slower from a view with gaps.
    return Examples(features=np.ascontiguousarray(table[:, :-1]), labels=np.ascontiguousarray(table[:, -1]))


def find_airfoil(given: Path | None, cache: Path, url: str = AIRFOIL_URL) -> Path:
    """Returns the airfoil file: the given one, else the cached one, else a download into the cache.

    Args:
        given: The file, or a folder with `airfoil_self_noise.dat`; None means the cache or a download.
        cache: Folder of downloads, created if it does not exist.
        url: The address to download from.

    Raises:
        DataError: The given file does not exist, the download failed, or its checksum is wrong.
    """
    if given is not None:
        # Its checksum is not checked: the user may have a file of the same format.
        file = given / AIRFOIL_FILE if given.is_dir() else given
        if not file.is_file():
            raise DataError(f"no such file: {file}; {GIVE_THE_FILE}")
        return file
    file = cache / AIRFOIL_FILE
    if file.is_file() and _is_airfoil(file.read_bytes()):  # a damaged file in the cache is replaced
        return file
    content = _download(url)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent)  # renamed, so that no other run reads half a file
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        Path(temporary).replace(file)
    except OSError as error:
        raise DataError(f"cannot write to the cache {file.parent}: {error.strerror}; {GIVE_THE_FILE}") from error
    return file


def _is_airfoil(content: bytes) -> bool:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest() == AIRFOIL_SHA1


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310  a constant address
            content: bytes = response.read(1 << 20)  # the file has 60 KB; a wrong server may send without an end
    except (OSError, ValueError) as error:
        raise DataError(f"cannot download the airfoil data ({AIRFOIL_FILE}): {GIVE_THE_FILE}") from error
    if not _is_airfoil(content):
        raise DataError(f"the downloaded {AIRFOIL_FILE} has a wrong checksum: {GIVE_THE_FILE}")
    return content
