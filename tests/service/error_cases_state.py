"""Requests that the server's state refuses: models, sessions, rounds, limits, shutdown."""

import os
from collections.abc import Callable
from dataclasses import replace

from error_scene import LARGE, Request, Scene, case, opened, step, stream
from messages import ADADELTA_SLOTS, adadelta, creation, sync
from wire import Session, eventually

from deltaserve.v1 import common_pb2 as pb
from deltaserve.v1 import model_service_pb2 as models
from deltaserve.v1 import worker_service_pb2 as workers
from deltaserve_server.durability.commits import StorageError
from deltaserve_server.engine.recovery_progress import RecoveryProgress
from deltaserve_server.memory.host import HostStore
from deltaserve_server.service.servicers import worker_service

ID = b"0123456789abcdef"


# --- models


@case("MODEL_NOT_FOUND", model="nothing")
def a_model_that_is_not_there(scene: Scene) -> Request:
    return "GetModel", [models.GetModelRequest(model="nothing")]


@case("MODEL_NOT_FOUND", model="nothing")
def pulling_what_is_not_there(scene: Scene) -> Request:
    return "Pull", [workers.PullRequest(model="nothing")]


@case("MODEL_NOT_FOUND", model="nothing")
def pulling_a_state_that_is_not_there(scene: Scene) -> Request:
    return "PullState", [models.PullStateRequest(model="nothing")]


@case("MODEL_NOT_FOUND", model="nothing")
def putting_a_state_nowhere(scene: Scene) -> Request:
    return "PutState", [models.PutStateRequest(header=models.PutStateHeader(model="nothing"))]


@case("MODEL_NOT_FOUND", model="nothing")
def extending_what_is_not_there(scene: Scene) -> Request:
    return "ExtendModel", [models.ExtendModelRequest(header=models.ExtendModelHeader(model="nothing"))]


@case("MODEL_NOT_FOUND", model="nothing")
def joining_what_is_not_there(scene: Scene) -> Request:
    return "OpenSession", [workers.OpenSessionRequest(model="nothing", worker="a")]


@case("MESSAGE_INVALID", message="StepRequest: it has a header")
def a_step_without_a_header(scene: Scene) -> Request:
    return "Step", [workers.StepRequest()]


@case("MODEL_NOT_FOUND", model="deleted")
def a_model_that_was_deleted(scene: Scene) -> Request:
    scene.wire.create("deleted")
    session = scene.wire.open("deleted", "a")
    scene.wire.delete("deleted")
    return step(session.header(1), *[1.0] * 5)


@case("MODEL_NOT_FOUND", model="two?lines?")
def a_model_name_of_two_lines(scene: Scene) -> Request:
    return "DeleteModel", [models.DeleteModelRequest(model="two\nlines\0")]


@case("MODEL_MISMATCH", model="m", difference="tensor 0 is w [4] in group 0, not w [2, 2] in group 0")
def another_shape(scene: Scene) -> Request:
    return "CreateModel", list(creation("m", {"w": (2, 2), "b": ()}))


@case("MODEL_MISMATCH", model="m", difference="tensor 1 is b [] in group 0, not bias [] in group 0")
def another_tensor_name(scene: Scene) -> Request:
    return "CreateModel", list(creation("m", {"w": (4,), "bias": ()}))


@case("MODEL_MISMATCH", model="m", difference="it has 2 tensors, not 1")
def fewer_tensors(scene: Scene) -> Request:
    return "CreateModel", list(creation("m", {"w": (4,)}))


@case("MODEL_MISMATCH", model="m", difference="it has 1 parameter groups, not 2")
def more_groups(scene: Scene) -> Request:
    return "CreateModel", list(creation("m", groups=[adadelta()] * 2))


@case("MODEL_MISMATCH", model="m", difference="rho of group 0 is 0.9, not 0.95")
def another_hyperparameter(scene: Scene) -> Request:
    return "CreateModel", list(creation("m", groups=[adadelta(rho=0.95)]))


@case("MODEL_MISMATCH", model="m")
def another_policy(scene: Scene) -> Request:
    return "CreateModel", list(creation("m", policy=sync()))


@case("MODEL_MISMATCH", model="long")
def tensors_of_the_longest_names(scene: Scene) -> Request:
    scene.wire.create("long", {"\U0001f600" * 256: (4,)})
    scene.models.append("long")
    return "CreateModel", list(creation("long", {"\U0001f601" * 256: (1, 4)}))


@case("MODEL_MISMATCH", model="m", difference="it has 2 tensors in 1 groups")
def extending_from_beyond_the_end(scene: Scene) -> Request:
    header = models.ExtendModelHeader(model="m", tensor_count=3, group_count=1)
    return "ExtendModel", [models.ExtendModelRequest(header=header)]


@case("MODEL_MISMATCH", model="m", difference="it has 2 tensors in 1 groups")
def extending_where_another_tensor_is(scene: Scene) -> Request:
    tensors = [pb.TensorSpec(name="c")]
    header = models.ExtendModelHeader(model="m", tensor_count=1, group_count=1, tensors=tensors)
    return "ExtendModel", [models.ExtendModelRequest(header=header)]


@case("PUSH_INVALID", field="gradient")
def a_step_of_a_model_that_is_too_large_for_one_message(scene: Scene) -> Request:
    scene.wire.create("large", {"w": (LARGE,)})
    scene.models.append("large")
    return step(scene.wire.open("large", "a").header(1), 1.0)


# --- sessions


@case("SESSION_UNKNOWN")
def a_session_that_was_never_opened(scene: Scene) -> Request:
    return step(workers.PushHeader(model="m", session_id=ID, epoch=1, sequence=1), *[1.0] * 5)


@case("SESSION_UNKNOWN")
def a_session_without_an_id(scene: Scene) -> Request:
    return stream(workers.PushHeader(model="m", sequence=3), (0, [1.0] * 5))


@case("SESSION_UNKNOWN")
def keeping_a_session_that_was_closed(scene: Scene) -> Request:
    closed = scene.wire.open("m", "b")
    scene.wire.close(closed)
    return "KeepSession", [workers.KeepSessionRequest(**closed.id)]


@case("SESSION_UNKNOWN")
def closing_twice(scene: Scene) -> Request:
    closed = scene.wire.open("m", "b")
    scene.wire.close(closed)
    return "CloseSession", [workers.CloseSessionRequest(**closed.id)]


@case("SESSION_UNKNOWN")
def a_session_of_another_model(scene: Scene) -> Request:
    scene.other("n", (5,))
    return step(Session("n", scene.a.opened).header(3), *[1.0] * 5)


@case("SESSION_UNKNOWN")
def a_session_whose_lease_ran_out(scene: Scene) -> Request:
    short = scene.wire.open("m", "b", lease_seconds=0.25)
    eventually(lambda: len(scene.wire.model("m").sessions) == 1, "the lease does not run out")
    return step(short.header(1), *[1.0] * 5)


@case("SESSION_FENCED", worker="b", epoch="1", current="2")
def a_session_that_a_newer_one_has_taken_over(scene: Scene) -> Request:
    older = scene.wire.open("m", "b")
    scene.wire.open("m", "b")
    return step(older.header(1), *[1.0] * 5)


@case("SESSION_FENCED", worker="b", epoch="1", current="3")
def a_fenced_session_after_the_newer_one_has_gone(scene: Scene) -> Request:
    older = scene.wire.open("m", "b")
    for _ in range(2):
        newer = scene.wire.open("m", "b")
    scene.wire.close(newer)
    return "KeepSession", [workers.KeepSessionRequest(**older.id)]


@case("PUSH_INVALID", field="epoch")
def an_epoch_that_is_not_the_session_s(scene: Scene) -> Request:
    header = scene.a.header(3)
    header.epoch = 7
    return stream(header, (0, [1.0] * 5))


@case("SEQUENCE_GAP", expected="3", got="4")
def a_number_left_out(scene: Scene) -> Request:
    return step(scene.a.header(4), *[1.0] * 5)


@case("SEQUENCE_GAP", expected="3", got=str((1 << 64) - 1))
def the_largest_number(scene: Scene) -> Request:
    return stream(scene.a.header((1 << 64) - 1), (0, [1.0] * 5))


@case("SEQUENCE_REUSED", sequence="2")
def other_content_under_the_same_number(scene: Scene) -> Request:
    return step(scene.a.header(2), 1, 1, 1, 1, 1.5)


@case("SEQUENCE_REUSED", sequence="2")
def the_same_values_of_other_tensors(scene: Scene) -> Request:
    return stream(scene.a.header(2, absent_tensors=[1]), (0, [1.0] * 4))


# --- shared memory


@case("SHARED_MEMORY_UNAVAILABLE", why="the session has none: call OpenSharedMemory first")
def a_push_in_memory_that_was_never_opened(scene: Scene) -> Request:
    return "StreamStep", [workers.StreamStepRequest(header=scene.a.header(3, shared_memory=True))]


@case("SHARED_MEMORY_UNAVAILABLE", why="the server does not offer it")
def memory_of_a_server_that_shares_none(scene: Scene) -> Request:
    closed = replace(scene.server.config, shared_memory=False)
    scene.monkeypatch.setattr(scene.server._catalog, "config", closed)
    return "OpenSharedMemory", [workers.OpenSharedMemoryRequest(**scene.a.id)]


@case("SHARED_MEMORY_UNAVAILABLE", why="the server is on another host")
def memory_for_a_caller_from_elsewhere(scene: Scene) -> Request:
    scene.monkeypatch.setattr(worker_service, "_LOCAL_PEERS", ("ipv4:192.0.2.",))
    return "OpenSharedMemory", [workers.OpenSharedMemoryRequest(**scene.a.id)]


@case("SHARED_MEMORY_UNAVAILABLE", why="Too many open files")
def memory_where_the_system_has_no_files_left(scene: Scene) -> Request:
    def full(*_: object) -> int:
        raise OSError(24, "Too many open files")

    scene.monkeypatch.setattr(os, "memfd_create", full)
    return "OpenSharedMemory", [workers.OpenSharedMemoryRequest(**scene.a.id)]


@case("SESSION_UNKNOWN")
def memory_for_a_session_that_was_never_opened(scene: Scene) -> Request:
    return "OpenSharedMemory", [workers.OpenSharedMemoryRequest(model="m", session_id=ID, epoch=1)]


@case("PUSH_INVALID", field="epoch")
def memory_for_an_epoch_that_is_not_the_session_s(scene: Scene) -> Request:
    request = workers.OpenSharedMemoryRequest(**scene.a.id)
    request.epoch = 7
    return "OpenSharedMemory", [request]


@case("MODEL_NOT_FOUND", model="nothing")
def memory_for_what_is_not_there(scene: Scene) -> Request:
    return "OpenSharedMemory", [workers.OpenSharedMemoryRequest(model="nothing")]


# --- rounds


@case("ROUND_CLOSED", base="0", current="1")
def a_push_on_weights_from_before_the_round(scene: Scene) -> Request:
    scene.other("s", policy=sync())
    session = scene.wire.open("s", "a")
    scene.wire.step(session.header(1), [1.0] * 4)
    return step(session.header(2, base_version=0), *[1.0] * 4)


@case("ROUND_CLOSED", base="0", current="1")
def a_second_push_for_one_round(scene: Scene) -> Request:
    scene.other("s", policy=sync(2))
    session = scene.wire.open("s", "a")
    scene.start_push(session, 1, 4)
    return step(session.header(2), *[1.0] * 4)


@case("ROUND_CLOSED", base="0", current="1")
def a_push_of_one_who_joins_at_the_next_round(scene: Scene) -> Request:
    scene.other("s", policy=sync())
    first, _second = scene.wire.open("s", "a"), scene.wire.open("s", "b")
    scene.start_push(first, 1, 4)
    return step(scene.wire.open("s", "c").header(1), *[1.0] * 4)


@case("HYPERPARAMETER_CONFLICT", field="groups[0].lr", round="0.5", got="0.25")
def two_learning_rates_in_one_round(scene: Scene) -> Request:
    scene.other("s", policy=sync(2))
    first, second = scene.wire.open("s", "a"), scene.wire.open("s", "b")
    header = first.header(1, hyperparameters=[adadelta(lr=0.5)])
    scene.calls.append(scene.wire.start(*step(header, *[1.0] * 4)))
    eventually(lambda: any(s.waiting for s in scene.wire.model("s").sessions), "the push does not wait")
    return step(second.header(1, hyperparameters=[adadelta(lr=0.25)]), *[1.0] * 4)


# --- limits


@case("MEMORY_BUDGET", needed="24000000")
def a_model_larger_than_the_server_may_hold(scene: Scene) -> Request:
    return "CreateModel", list(creation("new", {"w": (1_000_000,)}))


@case("MEMORY_BUDGET", needed=str(24 << 48))
def a_model_of_a_petabyte(scene: Scene) -> Request:
    config = pb.ModelConfig(name="new", tensors=[pb.TensorSpec(name="w", shape=[1 << 48])])
    return "CreateModel", [models.CreateModelRequest(config=config)]


@case("MEMORY_BUDGET", retry=True, needed=str(24 * 3 * LARGE // 2))
def a_model_for_which_others_leave_no_room(scene: Scene) -> Request:
    scene.other("large", (LARGE,))
    return "CreateModel", list(creation("new", {"w": (3 * LARGE // 2,)}))


@case("MEMORY_BUDGET", retry=True, needed=str(4 * LARGE))
def more_pushes_than_may_be_staged(scene: Scene) -> Request:
    scene.other("large", (LARGE,), sync(2))
    a, b = scene.wire.open("large", "a"), scene.wire.open("large", "b")
    scene.start_push(b, 1, LARGE)
    return stream(a.header(1), (0, [1.0] * LARGE))


@case("MEMORY_BUDGET", needed=str(12 * LARGE))
def a_state_larger_than_what_may_be_staged(scene: Scene) -> Request:
    scene.other("large", (LARGE,))
    return "PutState", [models.PutStateRequest(header=models.PutStateHeader(model="large", slots=ADADELTA_SLOTS))]


@case("MEMORY_BUDGET", needed="24000000")
def an_extension_larger_than_the_server_may_hold(scene: Scene) -> Request:
    tensors = [pb.TensorSpec(name="new", shape=[1_000_000])]
    header = models.ExtendModelHeader(model="m", tensor_count=2, group_count=1, tensors=tensors)
    return "ExtendModel", [models.ExtendModelRequest(header=header)]


@case("MEMORY_BUDGET", needed=str(6 * LARGE))
def memory_for_gradients_where_there_is_none_left(scene: Scene) -> Request:
    scene.other("large", (3 * LARGE // 2,))
    scene.models.remove("large")  # to read its state takes more than is left
    first, second = scene.wire.open("large", "a"), scene.wire.open("large", "b")
    scene.wire.one("OpenSharedMemory", workers.OpenSharedMemoryRequest(**first.id))
    return "OpenSharedMemory", [workers.OpenSharedMemoryRequest(**second.id)]


@case("SESSION_LIMIT", limit="6")
def more_workers_than_there_may_be(scene: Scene) -> Request:
    for number in range(5):
        scene.wire.open("m", f"w{number}")
    return opened(scene)


@case("MODEL_LIMIT", limit="5")
def more_models_than_there_may_be(scene: Scene) -> Request:
    for number in range(4):
        scene.other(f"m{number}")
    return "CreateModel", list(creation("new"))


# --- a server that stops, and one with a fault


def _draining(make: Callable[[Scene], Request]) -> Callable[[Scene], Request]:
    def prepare(scene: Scene) -> Request:
        scene.other("s", policy=sync(2))
        scene.start_push(scene.wire.open("s", "a"), 1, 4)
        request = make(scene)
        scene.drain()
        return request

    prepare.__name__ = f"{make.__name__}_at_the_end"
    return prepare


@case("DRAINING", retry=True)
@_draining
def a_push(scene: Scene) -> Request:
    return step(scene.a.header(3), *[1.0] * 5)


@case("DRAINING", retry=True)
@_draining
def a_session(scene: Scene) -> Request:
    return opened(scene)


@case("DRAINING", retry=True)
@_draining
def a_model(scene: Scene) -> Request:
    return "CreateModel", list(creation("new"))


# --- what survives


@case("NOT_DURABLE")
def a_snapshot_where_there_is_no_place_for_it(scene: Scene) -> Request:
    return "SaveSnapshot", [models.SaveSnapshotRequest(model="m")]


@case("NOT_DURABLE")
def the_snapshots_where_there_is_no_place_for_them(scene: Scene) -> Request:
    return "ListSnapshots", [models.ListSnapshotsRequest(model="m")]


@case("MODEL_NOT_FOUND", model="nothing")
def a_snapshot_of_what_is_not_there(scene: Scene) -> Request:
    return "SaveSnapshot", [models.SaveSnapshotRequest(model="nothing")]


def _coming(scene: Scene) -> None:
    scene.monkeypatch.setattr(scene.server._catalog, "_recovery", RecoveryProgress({"coming": 400, "further": 600}))
    scene.server._catalog._recovery.add(250)


@case("RECOVERING", retry=True, model="coming", percent="25")
def a_model_that_is_still_read(scene: Scene) -> Request:
    _coming(scene)
    return "GetModel", [models.GetModelRequest(model="coming")]


@case("RECOVERING", retry=True, model="further", percent="25")
def creating_a_model_that_is_still_read(scene: Scene) -> Request:
    _coming(scene)
    return "CreateModel", list(creation("further"))


@case("RECOVERING", retry=True, model="coming", percent="25")
def the_list_of_models_some_of_which_are_still_read(scene: Scene) -> Request:
    _coming(scene)
    return "ListModels", [models.ListModelsRequest()]


def _full(*_: object) -> None:
    raise StorageError("No space left on device")


def _on_a_full_disk(scene: Scene) -> None:
    scene.monkeypatch.setattr(scene.server._catalog.get("m")._commits, "ready", _full)


@case("STORAGE_UNAVAILABLE", retry=True, why="No space left on device")
def a_push_that_cannot_be_written_down(scene: Scene) -> Request:
    _on_a_full_disk(scene)
    return step(scene.a.header(3), *[1.0] * 5)


@case("STORAGE_UNAVAILABLE", retry=True, why="No space left on device")
def a_session_that_cannot_be_written_down(scene: Scene) -> Request:
    _on_a_full_disk(scene)
    return opened(scene)


@case("LINEAGE_UNKNOWN", model="m")
def a_worker_of_another_model_of_the_same_name(scene: Scene) -> Request:
    return opened(scene, lineage=ID)


@case("LINEAGE_CHANGED", model="m")
def a_push_on_weights_that_a_restart_has_lost(scene: Scene) -> Request:
    return step(scene.a.header(3, lineage=ID), *[1.0] * 5)


@case("INTERNAL")
def a_model_that_a_fault_has_ended(scene: Scene) -> Request:
    def fault(*_: object) -> None:
        raise ZeroDivisionError("a secret")

    scene.wire.create("broken")
    session = scene.wire.open("broken", "a")
    with scene.monkeypatch.context() as patch:
        patch.setattr(HostStore, "update", fault)
        method, messages = step(session.header(1), *[1.0] * 5)
        answer = scene.wire.refused(method, *messages)
    assert answer.reason == "INTERNAL"
    assert "secret" not in str(answer)
    return "Pull", [workers.PullRequest(model="broken")]
