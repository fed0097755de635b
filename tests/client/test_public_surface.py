"""The public API of `deltaserve`: exactly the names of `__all__`, and no protobuf types."""

import dataclasses
import doctest
import inspect
import subprocess
import sys
import typing
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

import deltaserve

CLASSES = [value for name in deltaserve.__all__ if inspect.isclass(value := getattr(deltaserve, name))]


def functions() -> Iterator[tuple[str, Any]]:
    """Yields every public function, method and property with its name."""
    yield "connect", deltaserve.connect
    for kind in CLASSES:
        for name, member in inspect.getmembers(kind):
            function = member.fget if isinstance(member, property) else member
            if inspect.isfunction(function) and (not name.startswith("_") or name in ("__init__", "__enter__")):
                yield f"{kind.__name__}.{name}", function


def parts(annotation: Any) -> Iterator[Any]:
    """Yields an annotation and all types inside it."""
    yield annotation
    for argument in typing.get_args(annotation):
        yield from parts(argument)


def foreign(annotation: Any) -> list[str]:
    """Returns the protobuf and gRPC modules that an annotation refers to."""
    modules = {getattr(part, "__module__", None) or "" for part in parts(annotation)}
    return [module for module in modules if module.startswith(("google", "grpc", "deltaserve.v1"))]


def test_all_is_what_exists() -> None:
    """The order is ruff's, which takes SGD for a constant."""
    exists = {
        name
        for name, value in vars(deltaserve).items()
        if not isinstance(value, ModuleType) and (not name.startswith("_") or name == "__version__")
    }
    assert sorted(deltaserve.__all__) == sorted(exists)


def test_every_public_name_is_documented() -> None:
    undocumented = [kind.__name__ for kind in CLASSES if not kind.__doc__]
    undocumented += [name for name, function in functions() if not name.endswith("__") and not function.__doc__]
    assert undocumented == []


def test_no_signature_has_a_type_of_protobuf_or_grpc() -> None:
    seen = 0
    for name, function in functions():
        if name in ("Worker.__init__", "Model.__init__"):
            continue  # Model and Client create these; users never call their constructors
        for annotation in typing.get_type_hints(function).values():
            seen += 1
            assert foreign(annotation) == [], name
    assert seen > 50, "the walk has lost its way"


def test_no_field_of_a_value_has_a_type_of_protobuf_or_grpc() -> None:
    values = [kind for kind in CLASSES if dataclasses.is_dataclass(kind)]
    assert len(values) >= 10
    for kind in values:
        for field, annotation in typing.get_type_hints(kind).items():
            assert foreign(annotation) == [], f"{kind.__name__}.{field}"


def test_no_public_attribute_holds_a_message(client: deltaserve.Client) -> None:
    model = client.create_model("m", {"w": np.zeros(2, np.float32)})
    with model.worker("a") as worker:
        worker.step({"w": np.ones(2, np.float32)})
        things = [client, client.server_info(), client.models()[0], model, model.info(), model.pull_state(), worker]
        things += [worker.last_result, worker.get_push(), model.info().sessions[0]]
        events = model.watch()
        next(events)
        worker.step({"w": np.ones(2, np.float32)})
        event = next(events)
        things += [event, event.contributions[0]]
        for thing in things:
            for name in (name for name in dir(thing) if not name.startswith("_")):
                module = type(getattr(thing, name)).__module__
                assert not module.startswith(("google", "grpc", "deltaserve.v1")), f"{type(thing).__name__}.{name}"


def test_every_error_is_an_error_of_deltaserve() -> None:
    errors = [kind for kind in CLASSES if issubclass(kind, Exception)]
    assert len(errors) == 9
    assert issubclass(deltaserve.StaleGradientError, deltaserve.ConflictError), "who handled the latter still does"
    assert all(issubclass(kind, deltaserve.Error) for kind in errors)
    error = deltaserve.RequestError("text", reason="NAME_INVALID", metadata={"field": "name"})
    assert (str(error), error.reason, error.metadata) == ("text", "NAME_INVALID", {"field": "name"})
    assert (deltaserve.Error("text").reason, deltaserve.Error("text").metadata) == (None, {})


def test_the_example_in_the_documentation_runs() -> None:
    results = doctest.testmod(deltaserve)
    assert results.attempted > 0
    assert results.failed == 0


def test_the_import_loads_no_heavy_package() -> None:
    """`import deltaserve` must take less than 0.3 s, including numpy and gRPC."""
    heavy = ("torch", "numba", "typer", "rich", "grpc_tools", "deltaserve_server", "scipy", "sklearn", "matplotlib")
    source = f"import deltaserve, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
