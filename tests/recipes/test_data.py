"""Where the training data comes from, and how it is prepared."""

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from deltaserve_server.recipes.data import AIRFOIL_FILE, find_airfoil, load_airfoil, load_digits
from deltaserve_server.recipes.errors import DataError

NOWHERE = "http://127.0.0.1:9/airfoil_self_noise.dat"


def test_digits_are_split_in_the_same_way_every_time() -> None:
    train, test = load_digits()
    again, _ = load_digits()
    assert (len(train), len(test)) == (1437, 360)
    assert np.array_equal(train.features, again.features)
    assert np.array_equal(train.labels, again.labels)


def test_no_example_is_in_both_parts_and_each_digit_has_its_fraction() -> None:
    train, test = load_digits()
    assert not {row.tobytes() for row in train.features} & {row.tobytes() for row in test.features}
    for digit in range(10):
        here, there = np.count_nonzero(test.labels == digit), np.count_nonzero(train.labels == digit)
        assert here / (here + there) == pytest.approx(0.2, abs=0.01)


def test_airfoil_is_standardised_over_all_rows_and_cut_to_1500(synthetic_file: Path) -> None:
    examples = load_airfoil(synthetic_file)
    rows = np.array([line.split("\t") for line in synthetic_file.read_text().splitlines()], dtype=np.float64)
    expected = ((rows - rows.mean(axis=0)) / rows.std(axis=0))[:1500]
    assert examples.features.shape == (1500, 5)
    assert examples.features.dtype == examples.labels.dtype == np.float32
    # The mean of 1503 float32 values is known to about 1e-6 of their spread.
    np.testing.assert_allclose(examples.features, expected[:, :5], atol=2e-5)
    np.testing.assert_allclose(examples.labels, expected[:, 5], atol=2e-5)


def test_real_airfoil_has_the_published_floor_and_start(real_file: Path) -> None:
    examples = load_airfoil(real_file)
    x = np.column_stack([examples.features, np.ones(1500)]).astype(np.float64)
    solution, *_ = np.linalg.lstsq(x, examples.labels, rcond=None)
    assert np.square(x @ solution - examples.labels).mean() / 2 == pytest.approx(0.24169, abs=5e-6)
    assert np.square(examples.labels).mean() / 2 == pytest.approx(0.4933, abs=5e-5)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "expected 6 columns"),
        (b"1\t2\t3\n4\t5\t6\n", "expected 6 columns"),
        (b"1\t2\t3\t4\t5\t6\n1\t2\n", "expected 6 columns"),
        (b"a\tb\tc\td\te\tf\n", "expected 6 columns"),
        (b"1\t2\t3\t4\t5\tnan\n1\t2\t3\t4\t5\t6\n", "finite"),
        (b"1\t2\t3\t4\t5\t6\n1\t3\t4\t5\t6\t7\n", "one value in all rows"),
        (b"\xff\xfe\x00", "expected 6 columns"),
    ],
)
def test_a_file_in_another_format_is_refused_in_one_line(tmp_path: Path, content: bytes, text: str) -> None:
    file = tmp_path / "other.dat"
    file.write_bytes(content)
    with pytest.raises(DataError, match=text) as caught:
        load_airfoil(file)
    assert "\n" not in str(caught.value)
    assert "other.dat" in str(caught.value)


def test_a_given_file_and_a_given_folder_are_found(synthetic_file: Path, tmp_path: Path) -> None:
    assert find_airfoil(synthetic_file, tmp_path, NOWHERE) == synthetic_file
    assert find_airfoil(synthetic_file.parent, tmp_path, NOWHERE) == synthetic_file


def test_a_given_file_that_is_missing_is_never_downloaded(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no such file: .*missing\.dat; give the file with --data FILE or DELTASERVE_DATA"
    ):
        find_airfoil(tmp_path / "missing.dat", tmp_path, NOWHERE)


def test_without_a_network_one_line_says_how_to_give_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give the file with --data FILE or DELTASERVE_DATA=FILE") as caught:
        find_airfoil(None, tmp_path, NOWHERE)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@contextmanager
def serving(content: bytes) -> Iterator[tuple[str, Callable[[], int]]]:
    """A web server with one file; yields its address and a function that counts requests."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/{AIRFOIL_FILE}", lambda: len(asked)
        server.shutdown()


def test_a_download_with_a_wrong_checksum_is_refused_and_not_kept(tmp_path: Path, synthetic_file: Path) -> None:
    with serving(synthetic_file.read_bytes()) as (url, _), pytest.raises(DataError, match="wrong checksum"):
        find_airfoil(None, tmp_path, url)
    assert not list(tmp_path.iterdir())


def test_a_download_is_kept_and_a_damaged_copy_replaced(tmp_path: Path, real_file: Path) -> None:
    with serving(real_file.read_bytes()) as (url, asked):
        kept = find_airfoil(None, tmp_path / "new", url)
        assert find_airfoil(None, tmp_path / "new", url) == kept
        assert asked() == 1
        kept.write_bytes(kept.read_bytes()[:-1])
        find_airfoil(None, tmp_path / "new", url)
        assert asked() == 2
    assert kept.read_bytes() == real_file.read_bytes()
    assert list(kept.parent.iterdir()) == [kept]
