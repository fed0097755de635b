"""A forked child can exit, cannot use its parent's connection, and leaves its parent's session alone."""

import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

import deltaserve
from deltaserve_server import LocalServer

if TYPE_CHECKING:
    from tests.client.conftest import StartProgram

pytestmark = pytest.mark.deep

# gRPC itself warns about forks on standard error ("Other threads are currently calling into gRPC").
BEGIN = """
import gc, multiprocessing, os, sys, time
import numpy as np
import deltaserve

client = deltaserve.connect(sys.argv[1], timeout_seconds=20)
model = client.model("m")
worker = model.worker("parent", lease_seconds=1.0)
ONE = {"w": np.ones(3)}
worker.step(ONE)

def complains(call):
    try:
        call()
    except RuntimeError as error:
        assert "does not survive a fork: call deltaserve.connect in the child process" in str(error), error
    else:
        raise AssertionError("no complaint")
"""

FORK = """
began = time.monotonic()
if not (child := os.fork()):
    {child}
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), time.monotonic() - began)
time.sleep({idle_seconds})
worker.step(ONE)
worker.close()
print(worker.version)
"""

CHILDREN = {
    "exits": ("sys.exit(7)", 7),
    "raises": ("raise ValueError('as planned')", 1),
    "collects garbage": ("del worker, model, client; gc.collect(); sys.exit(7)", 7),
    "closes everything": ("worker.close(); client.close(); sys.exit(7)", 7),
    "uses the worker": ("complains(lambda: worker.step(ONE)); sys.exit(7)", 7),
    "uses the client": ("complains(client.models); complains(model.info); complains(worker.pull); sys.exit(7)", 7),
    "connects anew": ("deltaserve.connect(sys.argv[1]).model('m').worker('child').step(ONE); sys.exit(7)", 7),
}


@pytest.mark.parametrize("what", CHILDREN)
def test_a_forked_child(
    what: str, server: LocalServer, client: deltaserve.Client, start_program: "StartProgram"
) -> None:
    model = client.create_model("m", {"w": np.zeros(3)})
    child, status = CHILDREN[what]
    idle_seconds = 1.5 if what == "exits" else 0  # long enough for one renewal of the parent's lease
    program = start_program(BEGIN + FORK.format(child=child, idle_seconds=idle_seconds), server.target)
    got, seconds = program.line().split()
    assert int(got) == status, program.finish()[2]
    assert float(seconds) < 5
    anew = what == "connects anew"
    assert program.line() == str(2 + anew), "the parent's session lives"
    assert program.finish()[0] == 0
    assert model.info().version == 2 + anew


MULTIPROCESSING = """
def work(number):
    complains(client.models)
    return number * number

with multiprocessing.get_context("fork").Pool(2) as pool:
    print(sum(pool.map(work, range(10))), flush=True)
worker.step(ONE)
print(worker.version)
"""


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python itself warns of a fork beside threads")
def test_a_pool_of_forked_processes(
    server: LocalServer, client: deltaserve.Client, start_program: "StartProgram"
) -> None:
    model = client.create_model("m", {"w": np.zeros(3)})
    program = start_program(BEGIN + MULTIPROCESSING, server.target)
    assert program.line() == "285"
    assert program.line() == "2"
    assert program.finish()[0] == 0
    assert model.info().sessions == ()
