"""The code that numba generates for the kernels, and its cache on disk."""

import functools
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from tests.support.optimizer_cases import STRUCTURES, over

import deltaserve
import deltaserve_server.optimizers
from deltaserve._common.optimizers import SGD, Adadelta, Adagrad, Optimizer, RMSprop
from deltaserve_server.optimizers import _compiled, cpu, values

ROOM = Path(deltaserve_server.optimizers.__file__).parent

# Loads the rooms of the kernels alone, without the packages around them.
ALONE = """
import sys, types
for name, folder in {folders!r}.items():
    package = types.ModuleType(name)
    package.__path__ = [folder]
    sys.modules[name] = package
"""
FOLDERS = {
    "deltaserve": str(Path(deltaserve.__file__).parent),
    "deltaserve_server": str(ROOM.parent),
}
COMPUTES = """
import numpy as np
from deltaserve._common.optimizers import Adadelta
from deltaserve_server.optimizers import cpu, values
made = [np.zeros(3, np.float32) for _ in range(3)]
cpu.update(np.ones(3, np.float32), 1, made[:2], np.ones(3, np.float32), made[2], Adadelta(), 0)
print(np.concatenate(made).tobytes().hex(), values.inspect(np.ones(3, np.float32), 0, 0, values.lanes(3)))
"""


def run(code: str, folder: Path = ROOM.parent, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-B", "-c", ALONE.format(folders=FOLDERS | {"deltaserve_server": str(folder)}) + code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def expected() -> str:
    made = [np.zeros(3, np.float32) for _ in range(3)]
    cpu.update(np.ones(3, np.float32), 1, made[:2], np.ones(3, np.float32), made[2], Adadelta(), 0)
    return f"{np.concatenate(made).tobytes().hex()} {values.inspect(np.ones(3, np.float32), 0, 0, values.lanes(3))}\n"


@functools.cache
def assembly(function: Any, dispatcher: Any) -> str:
    """Compiles the function again, because code from the cache has no assembly to inspect."""
    signature = dispatcher.nopython_signatures[0]
    fresh: Any = numba.njit(signature, nogil=True, error_model="numpy")(function)
    return str(fresh.inspect_asm(signature.args))


def update_code(optimizer: Optimizer) -> str:
    kernel = cpu._kernel(optimizer, np.dtype(np.float32))
    code = assembly(kernel.py_func, kernel)
    if "vfmadd" not in code:
        pytest.skip("the test looks for instructions of x86 with AVX2")
    return code


def packed(instruction: str, code: str) -> int:
    """Counts the instructions on whole vectors of float32."""
    return len(re.findall(rf"{instruction}\s+.*%[yz]mm", code))


@pytest.fixture
def on_avx2() -> None:
    update_code(Adadelta())


@over(STRUCTURES)
def test_update_is_vector_code_in_single_precision(optimizer: Optimizer) -> None:
    code = update_code(optimizer)
    assert packed(r"vfn?madd\d+ps", code)
    # Only the squares are in double precision: no packed double is rounded to a float.
    assert not re.search(r"v(sqrt|div|mul)[sp]d|v(sqrt|div|mul|add)ss|vcvtpd2ps", code)
    assert "fmaf" not in code


@over(STRUCTURES)
def test_squares_of_changes_are_vector_code(optimizer: Optimizer) -> None:
    code = update_code(optimizer)
    assert packed("vcvtps2pd", code)
    assert packed(r"vfmadd\d+pd", code)
    assert not re.search(r"vfmadd\d+sd|vmulsd", code)


@pytest.mark.usefixtures("on_avx2")
def test_squares_of_gradients_are_vector_code() -> None:
    code = assembly(values._inspect_chunk, values._inspect)
    assert packed("vcvtps2pd", code)
    assert packed(r"vfmadd\d+pd", code)
    assert not re.search(r"vfmadd\d+sd|vmulsd", code)


def test_new_weights_can_be_stored_around_the_caches() -> None:
    # Streaming stores of packed singles, and the fence that orders them before later stores.
    assert packed("vmovntps", update_code(Adadelta()))
    assert re.search(r"mfence|lock", update_code(Adadelta()))


@pytest.mark.usefixtures("on_avx2")
def test_a_scaled_sum_is_vector_code_and_rounds_twice() -> None:
    code = assembly(cpu._add_scaled, cpu._add)
    assert packed("vmulps", code)
    assert packed("vaddps", code)
    assert "fmadd" not in code


@pytest.mark.parametrize(
    ("optimizer", "fused", "roots"),
    # With the one of the weight decay. RMSprop has another for the variance, and Adagrad's root is the unit here.
    [(Adadelta(), 4, 2), (Adagrad(), 2, 1), (RMSprop(), 2, 1), (RMSprop(centered=True), 4, 1)],
)
def test_products_are_fused_where_the_definition_says_so_and_nowhere_else(
    optimizer: Optimizer, fused: int, roots: int
) -> None:
    code = update_code(optimizer)
    assert packed(r"vfn?m(?:add|sub)\d+ps", code) * roots == packed("vsqrtps", code) * fused


def test_a_divisor_of_1_takes_no_division() -> None:
    """SGD has no other: its kernel divides and multiplies the gradient once in each loop."""
    code = update_code(SGD())
    assert packed("vdivps", code) == packed("vmulps", code) > 0


@pytest.mark.usefixtures("on_avx2")
def test_inspect_is_vector_code() -> None:
    assert re.search(r"vpmul(lq|udq)\s+.*%[yz]mm", assembly(values._inspect_chunk, values._inspect))


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A cache folder, and the output of the process that filled it."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, run(COMPUTES, NUMBA_CACHE_DIR=str(folder))


def files(cache: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.nb[ci]")}


COUNTS = """
kernel, = cpu._kernels.values()
print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
"""


@pytest.mark.deep
@pytest.mark.timeout(400)  # compiles kernels
def test_a_second_process_compiles_nothing(first_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    cache, first = first_run
    filled = files(cache)
    # An index, and three formats of each function that all need, two of the one that narrows; one kernel of Adadelta.
    assert len(filled) == (1 + 3) + (1 + 3) + (1 + 2) + (1 + 1)
    second = run(COMPUTES + COUNTS, NUMBA_CACHE_DIR=str(cache))
    assert (first.stdout, second.stdout) == (expected(), expected() + "1 0\n")
    assert first.stderr == second.stderr == ""
    assert filled == files(cache)


@pytest.mark.deep
@pytest.mark.timeout(400)  # compiles kernels
def test_a_changed_definition_is_not_served_from_the_cache(
    first_run: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    cache = shutil.copytree(first_run[0], tmp_path / "cache")
    changed = """
from deltaserve._common.optimizers import Adadelta
before = Adadelta.update
def update(self, op, g, w, slots, h):
    new, slots = before(self, op, g, w, slots, h)
    return new + 1.0, slots
Adadelta.update = update
"""
    made = run(changed + COMPUTES + COUNTS, NUMBA_CACHE_DIR=str(cache))
    assert made.stdout != expected()
    assert made.stdout.endswith("0 1\n")
    weights = [np.frombuffer(bytes.fromhex(text.split()[0]), np.float32)[6:] for text in (made.stdout, expected())]
    np.testing.assert_allclose(weights[0], weights[1] + 1)
    # The old definition still has its own.
    assert run(COMPUTES + COUNTS, NUMBA_CACHE_DIR=str(cache)).stdout == expected() + "1 0\n"


@pytest.mark.deep
@pytest.mark.timeout(400)  # compiles kernels
def test_preparing_from_several_threads_compiles_each_kernel_once(tmp_path: Path) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
from deltaserve._common.optimizers import SGD
from deltaserve_server.optimizers import cpu
with ThreadPoolExecutor(4) as executor:
    list(executor.map(cpu.prepare, [SGD(lr=0.1), SGD(lr=0.2), SGD(momentum=0.1), SGD(momentum=0.2)]))
kernels = cpu._kernels.values()
print(len(kernels), sum(sum(kernel.stats.cache_misses.values()) for kernel in kernels))
"""
    assert run(code, NUMBA_CACHE_DIR=str(tmp_path)).stdout == "6 6\n"


def test_other_hyperparameters_do_not_wait_for_the_compilation_of_another_kernel() -> None:
    """A scheduler changes lr with every push, while a new model's kernel compiles."""
    cpu.prepare(SGD())
    gradient, weights, new_weights = (np.ones(3, np.float32) for _ in range(3))
    with ThreadPoolExecutor(1) as executor, cpu._compiling:
        updated = executor.submit(cpu.update, gradient, 1, [], weights, new_weights, SGD(lr=0.123), 2)
        assert updated.result(timeout=20) > 0


def test_structures_have_kernels_of_their_own() -> None:
    names = {cpu._digest(optimizer) for optimizer in STRUCTURES}
    assert len(names) == len(STRUCTURES)


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
@pytest.mark.timeout(400)  # compiles kernels
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
@pytest.mark.timeout(400)  # compiles kernels
def test_the_kernels_work_without_a_folder_for_the_cache(tmp_path: Path) -> None:
    """As in a read-only image without a home folder."""
    shutil.copytree(ROOM, tmp_path / "optimizers", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "optimizers" / "__pycache__").write_bytes(b"")
    nowhere = str(tmp_path / "optimizers" / "__pycache__")
    made = run(COMPUTES, tmp_path, NUMBA_CACHE_DIR="", HOME=nowhere, XDG_CACHE_HOME=nowhere)
    assert made.stdout == expected()
    assert "cannot use its cache" in made.stderr


def test_an_error_of_the_function_itself_is_raised() -> None:
    with pytest.raises(numba.core.errors.NumbaError):
        _compiled.compiled(_compiled.types.void(_compiled.types.float32), lambda x: x.no_such_attribute)


PLAIN_PROCESSOR = """
import sys
import numpy as np
from deltaserve._common.optimizers import SGD, Adadelta, Adagrad, Adam, AdamW, Lion, RMSprop
from deltaserve_server.optimizers import cpu, float16, values
rng = np.random.default_rng(0)
size = 1003
bits = rng.integers(0, 1 << 16, size, np.uint16)
for optimizer in (Adadelta(lr=0.5), Adadelta(lr=0.5, weight_decay=0.1), SGD(momentum=0.9, nesterov=True), Adagrad(),
                  RMSprop(centered=True, momentum=0.9), Adam(amsgrad=True), AdamW(), Lion()):
    g, w, new, *slots = (rng.random(size, dtype=np.float32) for _ in range(3 + len(optimizer.slots)))
    print(cpu.update(g, 3, slots, w, new, optimizer, optimizer.relevant_count(5)))
    print(np.concatenate([*slots, new]).tobytes().hex())
for sent in (rng.standard_normal(size, dtype=np.float32), bits, bits.view(np.float16)):
    s, acc, w, new = (rng.random(size, dtype=np.float32) for _ in range(4))
    print(cpu.update(sent, 3, [s, acc], w, new, Adadelta(), 0))
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
@pytest.mark.timeout(400)  # compiles kernels
def test_a_processor_without_vector_extensions_gives_the_same_bits(tmp_path: Path) -> None:
    """A processor without fused multiply-add, float16 conversion and vectors of more than 16 bytes."""
    here = run(PLAIN_PROCESSOR)
    plain = run(PLAIN_PROCESSOR, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(tmp_path))
    assert plain.stdout == here.stdout
    assert plain.stderr == here.stderr == ""


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (["optimizers"], ["numpy", "numba", "torch", "triton", "grpc"]),
        (["optimizers.reference", "optimizers.formats", "optimizers.robust"], ["numba", "torch", "triton", "grpc"]),
        (["optimizers.trace"], ["numpy", "numba", "torch", "triton", "grpc"]),
        (["optimizers.cpu", "optimizers.values", "optimizers.float16"], ["torch", "triton", "grpc"]),
        (["optimizers.cuda"], ["numba", "grpc"]),
    ],
)
def test_what_modules_do_not_import(modules: list[str], absent: list[str]) -> None:
    imports = "".join(f"import deltaserve_server.{module}\n" for module in modules)
    assert run(f"{imports}print([name for name in {absent} if name in sys.modules])").stdout == "[]\n"
