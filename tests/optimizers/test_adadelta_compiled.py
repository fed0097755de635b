"""The code that numba generates for the kernels, and its cache on disk."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

import deltaserve_server.optimizers
from deltaserve_server.optimizers import Hyperparameters, _compiled, cpu, values

ROOM = Path(deltaserve_server.optimizers.__file__).parent


# Loads the package adadelta alone, without the server's package around it.
ALONE = """
import sys, types
package = types.ModuleType("deltaserve_server")
package.__path__ = [{folder!r}]
sys.modules["deltaserve_server"] = package
"""
COMPUTES = """
import numpy as np
from deltaserve_server.optimizers import Hyperparameters, cpu, values
made = [np.zeros(3, np.float32) for _ in range(3)]
cpu.update(np.ones(3, np.float32), 1, made[0], made[1], np.ones(3, np.float32), made[2], Hyperparameters())
print(np.concatenate(made).tobytes().hex(), values.inspect(np.ones(3, np.float32), 0, 0, values.lanes(3)))
"""


def run(code: str, folder: Path = ROOM.parent, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-B", "-c", ALONE.format(folder=str(folder)) + code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def expected() -> str:
    made = [np.zeros(3, np.float32) for _ in range(3)]
    cpu.update(np.ones(3, np.float32), 1, made[0], made[1], np.ones(3, np.float32), made[2], Hyperparameters())
    return f"{np.concatenate(made).tobytes().hex()} {values.inspect(np.ones(3, np.float32), 0, 0, values.lanes(3))}\n"


@functools.cache
def assembly(function: Any, dispatcher: Any) -> str:
    """Compiles the function again, because code from the cache has no assembly to inspect."""
    signature = dispatcher.nopython_signatures[0]
    fresh: Any = numba.njit(signature, nogil=True, error_model="numpy")(function)
    return str(fresh.inspect_asm(signature.args))


@pytest.fixture
def update_code() -> str:
    code = assembly(cpu._update_range, cpu._update)
    if "vfmadd" not in code:
        pytest.skip("the test looks for instructions of x86 with AVX2")
    return code


def test_update_is_vector_code_in_single_precision(update_code: str) -> None:
    for instruction in (r"vsqrtps", r"vdivps", r"vfn?madd\d+ps"):
        assert re.search(instruction + r"\s+.*%[yz]mm", update_code), instruction
    # Only the squares are in double precision: no packed double is rounded to a float.
    assert not re.search(r"vsqrt[sp]d|vdiv[sp]d|vmul[sp]d|vcvtpd2ps", update_code)
    assert "fmaf" not in update_code


@pytest.mark.usefixtures("update_code")
@pytest.mark.parametrize(
    ("function", "dispatcher"), [(cpu._update_range, cpu._update), (values._inspect_chunk, values._inspect)]
)
def test_squares_are_vector_code(function: Any, dispatcher: Any) -> None:
    code = assembly(function, dispatcher)
    for instruction in (r"vcvtps2pd", r"vfmadd\d+pd"):
        assert re.search(rf"{instruction}\s+.*%[yz]mm", code), instruction
    assert not re.search(r"vfmadd\d+sd|vmulsd", code)


def test_new_weights_can_be_stored_around_the_caches(update_code: str) -> None:
    # Streaming stores of packed singles, and the fence that orders them before later stores.
    assert re.search(r"vmovntps\s+%[yz]mm", update_code)
    assert re.search(r"mfence|lock", update_code)


@pytest.mark.usefixtures("update_code")
def test_a_scaled_sum_is_vector_code_and_rounds_twice() -> None:
    code = assembly(cpu._add_scaled, cpu._add)
    for instruction in ("vmulps", "vaddps"):
        assert re.search(rf"{instruction}\s+.*%[yz]mm", code), instruction
    assert "fmadd" not in code


def test_products_are_fused_where_the_source_says_so_and_nowhere_else(update_code: str) -> None:
    roots = len(re.findall(r"vsqrtps\s+.*%[yz]mm", update_code))
    fused = len(re.findall(r"vfn?m(?:add|sub)\d+ps\s+.*%[yz]mm", update_code))
    # Each two roots come with three fused sums and the weight decay's.
    assert roots % 2 == 0
    assert fused == 4 * roots // 2


@pytest.mark.usefixtures("update_code")
def test_inspect_is_vector_code() -> None:
    assert re.search(r"vpmul(lq|udq)\s+.*%[yz]mm", assembly(values._inspect_chunk, values._inspect))


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A cache folder, and the output of the process that filled it."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, run(COMPUTES, NUMBA_CACHE_DIR=str(folder))


@pytest.mark.deep
@pytest.mark.timeout(400)  # compiles all kernels
def test_a_cache_is_used(first_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    cache, first = first_run
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*.nb[ci]")}
    # An index and three formats of each function; weights are narrowed to two.
    assert len(files) == 4 + 3 + 3 + 3 + 2
    second = run(COMPUTES + "\nprint(sum(cpu._update.stats.cache_hits.values()))", NUMBA_CACHE_DIR=str(cache))
    assert (first.stdout, second.stdout) == (expected(), expected() + "3\n")
    assert first.stderr == second.stderr == ""
    assert files == {path: path.stat().st_mtime_ns for path in cache.rglob("*.nb[ci]")}


def test_importing_numba_survives_a_variable_that_disappears_from_the_environment() -> None:
    another_thread = """
import os
names = type(os.environ).__iter__
def interrupted(environment):
    read = list(names(environment))
    print(environment.pop("TAKEN_OUT", "gone before"))
    return iter(read)
type(os.environ).__iter__ = interrupted
"""
    assert run(another_thread + COMPUTES, TAKEN_OUT="now").stdout == "now\ngone before\n" + expected()


@pytest.mark.deep
@pytest.mark.timeout(400)  # compiles all kernels
@pytest.mark.parametrize(("kind", "damage"), [("nbi", b"\x80"), ("nbc", b"")])
def test_the_kernels_work_with_a_damaged_cache(
    first_run: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, kind: str, damage: bytes
) -> None:
    cache = shutil.copytree(first_run[0], tmp_path / "cache")
    for path in cache.rglob(f"*.{kind}"):
        path.write_bytes(damage)
    again = run(COMPUTES, NUMBA_CACHE_DIR=str(cache))
    assert again.stdout == expected()
    assert "cannot use its cache" in again.stderr


@pytest.mark.deep
@pytest.mark.timeout(400)  # compiles all kernels
def test_the_kernels_work_without_a_folder_for_the_cache(tmp_path: Path) -> None:
    """As in a read-only image without a home folder."""
    shutil.copytree(ROOM, tmp_path / "adadelta", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "adadelta" / "__pycache__").write_bytes(b"")
    nowhere = str(tmp_path / "adadelta" / "__pycache__")
    made = run(COMPUTES, tmp_path, NUMBA_CACHE_DIR="", HOME=nowhere, XDG_CACHE_HOME=nowhere)
    assert made.stdout == expected()
    assert "cannot use its cache" in made.stderr


def test_an_error_of_the_function_itself_is_raised() -> None:
    with pytest.raises(numba.core.errors.NumbaError):
        _compiled.compiled(_compiled.types.void(_compiled.types.float32), lambda x: x.no_such_attribute)


PLAIN_PROCESSOR = """
import sys
import numpy as np
from deltaserve_server.optimizers import float16
from deltaserve_server.optimizers import Hyperparameters, cpu, values
rng = np.random.default_rng(0)
size = 1003
bits = rng.integers(0, 1 << 16, size, np.uint16)
for sent in (rng.standard_normal(size, dtype=np.float32), bits, bits.view(np.float16)):
    s, acc, w, new = (rng.random(size, dtype=np.float32) for _ in range(4))
    for decay in (0.0, 0.1):
        print(cpu.update(sent, 3, s, acc, w, new, Hyperparameters(lr=0.5, weight_decay=decay)))
        print(np.concatenate([s, acc, new]).tobytes().hex())
    total = w.copy()
    cpu.add(total, sent, 0.3)
    print(np.nan_to_num(total).tobytes().hex())
    squares = values.lanes(size + 5)
    found = values.inspect(sent[:100] if sent.dtype == np.float32 else np.abs(new).astype(sent.dtype), 5, 0, squares)
    print(found, squares.tobytes().hex())
    if sent.dtype != np.float32:
        out = np.empty(size, sent.dtype)
        float16.narrow(rng.integers(0, 0x7F800000, size, np.uint32).view(np.float32), out)
        print(out.tobytes().hex())
"""


@pytest.mark.deep
@pytest.mark.timeout(400)  # compiles all kernels
def test_a_processor_without_vector_extensions_gives_the_same_bits(tmp_path: Path) -> None:
    """A processor without fused multiply-add, float16 conversion and vectors of more than 16 bytes."""
    here = run(PLAIN_PROCESSOR)
    plain = run(PLAIN_PROCESSOR, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(tmp_path))
    assert plain.stdout == here.stdout
    assert plain.stderr == here.stderr == ""


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (["adadelta"], ["numpy", "numba", "torch", "triton", "deltaserve"]),
        (["adadelta.reference", "adadelta.formats", "adadelta.robust"], ["numba", "torch", "triton", "deltaserve"]),
        (["adadelta.cpu", "adadelta.values", "adadelta.float16"], ["torch", "triton", "deltaserve"]),
        (["adadelta.cuda"], ["numba", "deltaserve"]),
    ],
)
def test_what_modules_do_not_import(modules: list[str], absent: list[str]) -> None:
    imports = "".join(f"import deltaserve_server.{module}\n" for module in modules)
    assert run(f"{imports}print([name for name in {absent} if name in sys.modules])").stdout == "[]\n"


def test_inputs_may_be_read_only_and_outputs_may_not() -> None:
    def vector(writeable: bool = True) -> cpu.Vector:
        made = np.ones(5, np.float32)
        made.flags.writeable = writeable
        return made

    cpu.update(vector(False), 1, vector(), vector(), vector(False), vector(), Hyperparameters())
    for read_only in (2, 3, 5):
        arguments: list[Any] = [vector(), 1, vector(), vector(), vector(), vector(), Hyperparameters()]
        arguments[read_only] = vector(False)
        with pytest.raises(TypeError):
            cpu.update(*arguments)


@pytest.mark.parametrize("place", [0, 2, 3, 4, 5])
def test_wrong_vectors_are_refused_and_nothing_changes(place: int) -> None:
    wrong: list[Any] = [np.ones(6, np.float32), np.ones(5), np.ones(10, np.float32)[::2], np.ones((5, 1), np.float32)]
    for vector in wrong:
        good = [np.full(5, 2, np.float32) for _ in range(5)]
        arguments: list[Any] = [good[0], 1, *good[1:], Hyperparameters()]
        arguments[place] = vector
        with pytest.raises((TypeError, ValueError)):
            cpu.update(*arguments)
        assert all((unchanged == 2).all() for unchanged in good)
        assert (vector == 1).all()
