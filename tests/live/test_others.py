"""Others in the house: wrappers, subclasses and attributes that are not the patch's own."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import wrapt
from livekit.plugins import xai

import xai_pool_patch
from tests.kit import (
    API_KEY,
    HAS_OWN_POOL,
    Line,
    all_closed,
    line_to,
    speak,
)

Sees = Callable[[Any], object]

needs_own_pool = pytest.mark.skipif(not HAS_OWN_POOL, reason="this plugin has no pool of its own")


@pytest.fixture(autouse=True)
def the_pool_stays_on(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever others do, it is no fault of the patch."""
    yield
    assert [r for r in caplog.get_records("call") if r.levelno >= logging.ERROR] == []


class Slotted(xai.TTS):
    """An application's TTS, with attributes of every kind."""

    __slots__ = ("slotted",)

    def __init__(self, line: Line, customer: str) -> None:
        super().__init__(api_key=API_KEY, http_session=line.http)
        self.customer = self.slotted = customer
        self.callback = self._greet  # a method of its own: whoever keeps that keeps the TTS

    def __getattr__(self, name: str) -> str:
        if name == "computed":
            return f"computed for {self.customer}"
        raise AttributeError(name)

    def _greet(self) -> str:
        return f"Hello, {self.customer}."

    @property
    def model(self) -> str:
        return f"the voice of {self.customer}"


def wrapped_plainly(dial: Any, sees: Sees) -> Any:
    @functools.wraps(dial)
    async def theirs(self: Any, *args: Any) -> Any:
        sees(self)
        ws = await dial(self, *args)
        sees(self)
        return ws

    return theirs


def wrapped_by_wrapt(dial: Any, sees: Sees) -> Any:
    async def theirs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        sees(instance)
        ws = await wrapped(*args, **kwargs)
        sees(instance)
        return ws

    return wrapt.FunctionWrapper(dial, theirs)


WRAPPED = [wrapped_plainly, wrapped_by_wrapt]


async def two_turns(line: Line, tts: xai.TTS) -> None:
    for text in ("One.", "Two."):
        heard = await speak(tts, text)
        assert heard.error is None
        assert heard.samples == {line.server.utterances[-1].number}


# Wrappers of everything


METHODS = [("TTS", name) for name in ("_connect_ws", "aclose", "prewarm", "synthesize")]
METHODS += [("TTS", "update_options"), ("SynthesizeStream", "_run_ws")]


def wrapped_transparently(function: Any, calls: list[str]) -> Any:
    @functools.wraps(function)
    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return theirs


def wrapped_transparently_by_wrapt(function: Any, calls: list[str]) -> Any:
    def theirs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        calls.append(wrapped.__name__)
        return wrapped(*args, **kwargs)

    return wrapt.FunctionWrapper(function, theirs)


@pytest.mark.parametrize("wrap", [wrapped_transparently, wrapped_transparently_by_wrapt])
@pytest.mark.parametrize("theirs_first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("theirs_off_first", [True, False], ids=["off first", "off last"])
async def test_wrappers_of_every_method_come_and_go(
    wrap: Any, theirs_first: bool, theirs_off_first: bool
) -> None:
    """A1: in any order, both do their work while they are there, and the patch can come again."""
    calls: list[str] = []
    owners = {"TTS": xai.TTS, "SynthesizeStream": xai.tts.SynthesizeStream}
    kept: list[tuple[type, str, bool, Any]] = []

    def put_on() -> None:
        for owner_name, name in METHODS:
            owner = owners[owner_name]
            kept.append((owner, name, name in vars(owner), getattr(owner, name)))
            setattr(owner, name, wrap(getattr(owner, name), calls))

    def take_off() -> None:
        while kept:
            owner, name, was_own, function = kept.pop()
            if was_own:
                setattr(owner, name, function)
            else:
                delattr(owner, name)

    async def play(line: Line, connections: int) -> None:
        before = len(line.server.connections)
        tts = line.tts()
        tts.prewarm()
        tts.update_options(voice="eve")
        await two_turns(line, tts)
        async with tts.synthesize("Three.") as stream:
            assert [event async for event in stream]
        await tts.aclose()
        made = {c.number for c in line.server.connections if c.utterances}
        assert len([number for number in made if number > before]) == connections
        await all_closed(line.server)

    unpatched = 1 if HAS_OWN_POOL else 3
    before = [dict(vars(owner)) for owner in owners.values()]
    async with line_to() as line:
        for step in [put_on, xai_pool_patch.install][:: 1 if theirs_first else -1]:
            step()
        await play(line, 1)
        assert set(calls) == {name for _, name in METHODS}
        steps = [take_off, xai_pool_patch.uninstall][:: 1 if theirs_off_first else -1]
        steps[0]()
        await play(line, 1 if theirs_off_first and not theirs_first else unpatched)
        steps[1]()
        await play(line, unpatched)
        xai_pool_patch.install()
        await play(line, 1)
        xai_pool_patch.uninstall()
    for owner, attributes in zip(owners.values(), before, strict=True):
        for name in {name for _, name in METHODS} | {"_pool"}:
            if name in attributes:
                setattr(owner, name, attributes[name])
            elif name in vars(owner):
                delattr(owner, name)
