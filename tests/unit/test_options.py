"""PoolOptions takes what makes sense and names the field where something does not."""

from __future__ import annotations

import dataclasses
import math

import pytest

from xai_pool_patch import InvalidOptionError, PoolOptions, XaiPoolPatchError

SECONDS = ["max_age", "max_idle_time", "heartbeat", "answer_timeout"]
CHOICES = {"interruption": ["discard", "clear"], "warm": ["auto", "always", "reply"]}


def test_the_defaults_are_the_documented_ones() -> None:
    """Whoever changes one has to change the documentation."""
    assert dataclasses.asdict(PoolOptions()) == {
        "min_size": 1,
        "max_age": 540.0,
        "warm": "auto",
        "redis_url": None,
        "max_idle_time": 60.0,
        "heartbeat": 20.0,
        "answer_timeout": 20.0,
        "interruption": "discard",
    }


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("value", [0, -1, -0.5, math.nan, math.inf, "5", None, True, [1]])
def test_seconds_must_be_finite_and_above_zero(name: str, value: object) -> None:
    """None of them can be None."""
    with pytest.raises(InvalidOptionError, match=rf"^{name} must be a number of seconds above 0"):
        PoolOptions(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", ["Clear", "", None, True, 1, ["clear"]])
def test_an_unknown_choice_is_refused(name: str, value: object) -> None:
    """The message lists the choices."""
    *others, last = map(repr, CHOICES[name])
    choices = f"{', '.join(others)} or {last}"
    with pytest.raises(InvalidOptionError, match=f"^{name} must be {choices}, not"):
        PoolOptions(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CHOICES)
def test_each_choice_is_accepted(name: str) -> None:
    """As the options keep it."""
    for value in CHOICES[name]:
        assert getattr(PoolOptions(**{name: value}), name) == value  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1, 51, 1.0, "1", None, True, math.nan])
def test_min_size_out_of_bounds_is_refused(value: object) -> None:
    """It is a number from zero to what xAI allows a team."""
    with pytest.raises(InvalidOptionError, match=r"^min_size must be a whole number from 0 to 50"):
        PoolOptions(min_size=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SECONDS)
def test_whole_numbers_are_accepted_as_seconds(name: str) -> None:
    """Nobody has to write 30.0."""
    assert getattr(PoolOptions(**{name: 30}), name) == 30


def test_min_size_accepts_its_bounds() -> None:
    """Both ends of the range are allowed."""
    assert [PoolOptions(min_size=n).min_size for n in (0, 50)] == [0, 50]


@pytest.mark.parametrize("value", [17, b"redis://host", object(), True])
def test_a_redis_url_must_be_text(value: object) -> None:
    """The message does not quote it: it may contain a password."""
    with pytest.raises(InvalidOptionError, match=r"^redis_url must be a string or None, not \w+$"):
        PoolOptions(redis_url=value)  # type: ignore[arg-type]


def test_options_are_frozen_and_keyword_only() -> None:
    """Nobody can change them after install()."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        PoolOptions().min_size = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        PoolOptions(1)  # type: ignore[misc]


def test_all_errors_have_a_common_base() -> None:
    """And a standard type beside it."""
    assert issubclass(InvalidOptionError, XaiPoolPatchError)
    assert issubclass(InvalidOptionError, ValueError)


@pytest.mark.parametrize(
    "name", ["linger", "close_timeout", "first_audio_timeout", "clear_timeout", "verify_after"]
)
def test_options_that_are_gone_are_refused(name: str) -> None:
    """Nobody goes on to rely on one."""
    with pytest.raises(TypeError, match=name):
        PoolOptions(**{name: 1.0})  # type: ignore[arg-type]
