"""Policies and optimizers as text: what is formatted can be parsed, and errors say what was expected."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

import deltaserve
from deltaserve._common.optimizers import OPTIMIZERS
from deltaserve._common.optimizers.definition import hyperparameters
from deltaserve_server.cli.settings import (
    format_optimizer,
    format_policy,
    parse_optimizer,
    parse_policy,
    parse_settings,
)

Policy = deltaserve.Sync | deltaserve.Async | deltaserve.Bounded

DEFAULTS = {kind: optimizer() for kind, optimizer in OPTIMIZERS.items()}

counts = st.integers(0, 2**32 - 1)
numbers = st.floats(allow_nan=False)


def booleans_or_numbers(value: float) -> st.SearchStrategy[float]:
    return st.booleans() if isinstance(value, bool) else numbers


policies = st.one_of(
    st.builds(
        deltaserve.Sync,
        min_workers=counts,
        quorum=st.none() | counts,
        grace_seconds=numbers,
        round_timeout_seconds=st.none() | numbers,
        reduction=st.sampled_from(["mean", "trimmed_mean", "median"]),
        trim=counts,
        clip_norm=st.none() | numbers,
    ),
    st.builds(deltaserve.Async, max_staleness=st.none() | st.integers(0, 2**64 - 1), damping=st.booleans()),
    st.builds(deltaserve.Bounded, slack=counts),
)
optimizers: st.SearchStrategy[deltaserve.Optimizer] = st.sampled_from([*OPTIMIZERS.values()]).flatmap(
    lambda kind: st.builds(kind, **{name: booleans_or_numbers(getattr(kind(), name)) for name in hyperparameters(kind)})
)


@settings(max_examples=50)
@given(policy=policies)
def test_every_formatted_policy_can_be_parsed(policy: Policy) -> None:
    assert parse_policy(format_policy(policy)).make() == policy


@settings(max_examples=50)
@given(optimizer=optimizers)
def test_every_formatted_optimizer_can_be_parsed(optimizer: deltaserve.Optimizer) -> None:
    assert parse_optimizer(format_optimizer(optimizer), DEFAULTS) == optimizer


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("sync", deltaserve.Sync()),
        ("async", deltaserve.Async()),
        ("bounded", deltaserve.Bounded()),
        ("bounded:slack=2", deltaserve.Bounded(slack=2)),
        ("async:max_staleness=8,damping=true", deltaserve.Async(max_staleness=8, damping=True)),
        ("sync:min_workers=4,quorum=3,grace_seconds=0.5", deltaserve.Sync(min_workers=4, quorum=3, grace_seconds=0.5)),
        ("sync:reduction=trimmed_mean,trim=1", deltaserve.Sync(reduction="trimmed_mean", trim=1)),
        ("sync:round_timeout_seconds=30,clip_norm=2", deltaserve.Sync(round_timeout_seconds=30.0, clip_norm=2.0)),
    ],
)
def test_parsing_and_formatting(text: str, policy: Policy) -> None:
    assert parse_policy(text).make() == policy
    assert format_policy(policy) == text


@pytest.mark.parametrize(
    ("text", "optimizer"),
    [
        *((kind, optimizer()) for kind, optimizer in OPTIMIZERS.items()),
        ("adadelta:rho=0.95", deltaserve.Adadelta(rho=0.95)),
        ("sgd:lr=0.05,momentum=0.9", deltaserve.SGD(lr=0.05, momentum=0.9)),
        ("adamw:lr=1e-05,amsgrad=true", deltaserve.AdamW(lr=1e-5, amsgrad=True)),
        ("rmsprop:lr=2,centered=true", deltaserve.RMSprop(lr=2.0, centered=True)),
    ],
)
def test_optimizers_have_the_same_form(text: str, optimizer: deltaserve.Optimizer) -> None:
    assert parse_optimizer(text, DEFAULTS) == optimizer
    assert format_optimizer(optimizer) == text


def test_settings_that_are_left_out_are_those_of_the_named_optimizer() -> None:
    optimizers = {"sgd": deltaserve.SGD(), "momentum": deltaserve.SGD(lr=0.01, momentum=0.9)}
    assert parse_optimizer("momentum:lr=2", optimizers) == deltaserve.SGD(lr=2.0, momentum=0.9)


def test_defaults_can_be_given_but_are_not_formatted() -> None:
    parsed = parse_policy(" sync:min_workers=1, reduction=mean ")
    assert format_policy(parsed.make()) == "sync"
    assert parsed.make(min_workers=4, quorum=5) == deltaserve.Sync(min_workers=1, quorum=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a policy, sync, async or bounded, as in sync:min_workers=4, got ''"),
        ("Sync", "expected a policy, sync, async or bounded, as in sync:min_workers=4, got 'Sync'"),
        ("sync,trim=1", "expected a policy, sync, async or bounded, as in sync:min_workers=4, got 'sync,trim=1'"),
        ("bounded:damping=true", "bounded has no setting 'damping'; its settings are slack"),
        ("async:", "async has no setting ''; its settings are max_staleness, damping"),
        ("bounded:slack", "slack: expected slack=VALUE, once"),
        ("bounded:slack=1,slack=2", "slack: expected slack=VALUE, once"),
        ("bounded:slack=two", "slack: expected a whole number, got 'two'"),
        ("bounded:slack=1.5", "slack: expected a whole number, got '1.5'"),
        ("bounded:slack=-1", "slack: expected a whole number, got '-1'"),
        ("bounded:slack=4294967296", "slack: 4294967296 is too large"),
        ("async:damping=1", "damping: expected true or false, got '1'"),
        ("async:max_staleness=", "max_staleness: expected a whole number, got ''"),
        ("sync:grace_seconds=soon", "grace_seconds: expected a number, got 'soon'"),
        ("sync:reduction=mode", "reduction: expected mean, trimmed_mean or median, got 'mode'"),
    ],
)
def test_errors_say_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(typer.BadParameter) as raised:
        parse_policy(text)
    assert raised.value.message == message


def parse_some(text: str) -> deltaserve.Optimizer:
    return parse_optimizer(text, {"sgd": deltaserve.SGD(), "adam": deltaserve.Adam(), "momentum": deltaserve.SGD()})


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (
            parse_some,
            "muon",
            ("expected an optimizer, sgd, adam or momentum, as in adamw:lr=1e-3,weight_decay=0.01, got 'muon'"),
        ),
        (
            parse_some,
            "adam:rho=1",
            "adam has no setting 'rho'; its settings are lr, beta1, beta2, eps, weight_decay, amsgrad, maximize",
        ),
        (
            parse_some,
            "sgd:kind=adam",
            "sgd has no setting 'kind'; its settings are lr, momentum, dampening, weight_decay, nesterov, maximize",
        ),
        (parse_some, "sgd:lr=fast", "lr: expected a number, got 'fast'"),
        (parse_some, "sgd:lr=0.1,nesterov=1", "nesterov: expected true or false, got '1'"),
        (
            lambda text: parse_settings("adagrad", deltaserve.Adagrad, text),
            "lr=1,momentum=2",
            (
                "adagrad has no setting 'momentum'; its settings are "
                "lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize"
            ),
        ),
    ],
)
def test_errors_about_optimizers_name_what_there_is(parse: Callable[[str], Any], text: str, message: str) -> None:
    with pytest.raises(typer.BadParameter) as raised:
        parse(text)
    assert raised.value.message == message


def test_the_error_for_an_unknown_setting_lists_the_known_ones() -> None:
    names = ", ".join(field.name for field in fields(deltaserve.Sync))
    with pytest.raises(typer.BadParameter, match=f"^sync has no setting 'x'; its settings are {names}$"):
        parse_policy("sync:x=1")
