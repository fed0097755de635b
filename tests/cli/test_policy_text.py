"""Policies as text: every formatted policy can be parsed, and errors say what was expected."""

from dataclasses import fields

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

import deltaserve
from deltaserve_server.cli.policy import format_policy, parse_policy

Policy = deltaserve.Sync | deltaserve.Async | deltaserve.Bounded

counts = st.integers(0, 2**32 - 1)
numbers = st.floats(allow_nan=False)
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


@settings(max_examples=50)
@given(policy=policies)
def test_every_formatted_policy_can_be_parsed(policy: Policy) -> None:
    assert parse_policy(format_policy(policy)).policy() == policy


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
    assert parse_policy(text).policy() == policy
    assert format_policy(policy) == text


def test_defaults_can_be_given_but_are_not_formatted() -> None:
    parsed = parse_policy(" sync:min_workers=1, reduction=mean ")
    assert format_policy(parsed.policy()) == "sync"
    assert parsed.policy(min_workers=4, quorum=5) == deltaserve.Sync(min_workers=1, quorum=5)


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


def test_the_error_for_an_unknown_setting_lists_the_known_ones() -> None:
    names = ", ".join(field.name for field in fields(deltaserve.Sync))
    with pytest.raises(typer.BadParameter, match=f"^sync has no setting 'x'; its settings are {names}$"):
        parse_policy("sync:x=1")
