"""Wrappers, subclasses and attributes of the application, beside those of the patch."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import wrapt
from livekit.agents.utils import ConnectionPool
from livekit.plugins import xai

import xai_pool_patch
from tests.kit import (
    API_KEY,
    HAS_NATIVE_POOL,
    SHAPE,
    Line,
    all_closed,
    interrupted,
    line_to,
    registry,
    speak,
)
from xai_pool_patch.plugin.releases import Shape

Sees = Callable[[Any], object]

needs_native_pool = pytest.mark.skipif(not HAS_NATIVE_POOL, reason="this plugin has no native pool")


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


# Wrappers of the dial


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_wrapper_of_connect_sees_the_tts(
    when: str, wrapped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K2: nothing is dialled ahead, since it may do anything. Its turns may be pooled."""
    account: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
    seen: list[list[Any]] = []

    def sees(self: Any) -> None:
        what = [isinstance(self, Slotted), type(self).__name__, self.model, self.provider]
        what += [self.label, self.sample_rate, self.customer, self.slotted, self.computed]
        what += [self._opts.voice, self.callback(), account[self], self == tts]
        self.dials = getattr(self, "dials", 0) + 1
        seen.append(what)

    if when == "after":
        xai_pool_patch.install()
    monkeypatch.setattr(xai.TTS, "_connect_ws", wrapped(vars(xai.TTS)["_connect_ws"], sees))
    xai_pool_patch.install()
    async with line_to() as line:
        tts = Slotted(line, "Ada")
        account[tts] = "paid"
        await two_turns(line, tts)
        expected = [True, "Slotted", "the voice of Ada", "xAI", f"{__name__}.Slotted", 24000]
        expected += ["Ada", "Ada", "computed for Ada", "ara", "Hello, Ada.", "paid", True]
        assert seen[0] == expected
        assert all(what == expected for what in seen)
        assert tts.dials == len(seen), "what it sets is kept"  # type: ignore[attr-defined]
        is_pooled = HAS_NATIVE_POOL or when == "after"
        assert len(line.server.connections) == (1 if is_pooled else 2)
        await tts.aclose()
    xai_pool_patch.uninstall()


async def test_a_subclass_may_bring_its_own_http_session(patched: None) -> None:
    """K2: what that session does cannot be known, so the TTS works as without the patch."""

    class Own(xai.TTS):
        def _ensure_session(self) -> Any:
            return self.http  # type: ignore[attr-defined]

    async with line_to() as line:
        tts: Any = Own(api_key=API_KEY)
        tts.http = line.http
        await two_turns(line, tts)
        assert registry().here().pools == {}
        await tts.aclose()


async def test_a_shared_pool_outlives_the_tts_that_made_it(patched: None) -> None:
    """P10, K3: it dials without it."""
    async with line_to() as line:
        first, second = Slotted(line, "Ada"), Slotted(line, "Grace")
        await two_turns(line, first)
        await two_turns(line, second)
        assert len(line.server.connections) == 1
        gone = weakref.ref(first)
        del first
        gc.collect()
        assert gone() is None
        await interrupted(line, second)
        await line.server.wait_for(lambda s: len(s.connections) == 2)
        await two_turns(line, second)
        assert len(line.server.connections) == 2
        await second.aclose()


async def test_a_tts_in_a_reference_cycle_is_collected(patched: None) -> None:
    """P10: the pool keeps nothing of it, not even a method that was set as an attribute."""
    async with line_to() as line:
        tts = Slotted(line, "Ada")
        await two_turns(line, tts)
        gone = weakref.ref(tts)
        del tts
        gc.collect()
        assert gone() is None
        await all_closed(line.server)


async def test_a_dial_does_not_call_del_or_init_subclass_of_the_application(
    patched: None,
) -> None:
    """They are called only for what the application makes itself."""
    ended: list[str] = []
    made: list[type] = []

    class Registered(xai.TTS):
        def __init_subclass__(cls, *, customer: str) -> None:
            made.append(cls)

        def __del__(self) -> None:
            ended.append(self.label)

    class Named(Registered, customer="Ada"):
        pass

    async with line_to() as line:
        tts = Named(api_key=API_KEY, http_session=line.http)
        await two_turns(line, tts)
        assert len(line.server.connections) == 1
        gc.collect()
        assert (ended, made) == ([], [Named])
        await tts.aclose()


@needs_native_pool
@pytest.mark.parametrize("name", ["_connect_ws", "_connect_pooled_ws"])
async def test_a_wrapper_is_called_from_when_it_is_set_until_it_is_removed(
    patched: None, name: str
) -> None:
    """K2: while it is there, the native pool serves; afterwards the shared one does again."""
    calls: list[str] = []
    original: Any = vars(xai.TTS)[name]
    async with line_to() as line:
        tts = line.tts()
        await two_turns(line, tts)
        setattr(xai.TTS, name, wrapped_plainly(original, lambda self: calls.append(self.model)))
        try:
            await two_turns(line, tts)
        finally:
            setattr(xai.TTS, name, original)
        # Before the dial and after it. The native pool knows the other one from the TTS's making.
        assert len(calls) == (2 if name == "_connect_ws" else 0)
        assert len(line.server.connections) == 2
        await two_turns(line, tts)
        assert len(line.server.connections) == 2
        await tts.aclose()


# Attributes of one instance


async def test_a_connect_method_set_on_an_instance_is_used() -> None:
    """No other TTS gets its connections: one a turn before 1.6.5, then the native pool."""
    xai_pool_patch.install()
    async with line_to() as line:
        tts, other = line.tts(), line.tts()
        calls: list[Any] = []

        async def mine(timeout: float, *opts: Any) -> Any:
            calls.append(opts)
            return await line.http.ws_connect(
                "wss://api.x.ai/v1/tts?voice=mine", headers={"Authorization": f"Bearer {API_KEY}"}
            )

        tts._connect_ws = mine  # type: ignore[method-assign,unused-ignore]
        await two_turns(line, tts)
        dials = 1 if HAS_NATIVE_POOL else 2
        assert [opts == () for opts in calls] == [SHAPE is Shape.READS_OPTIONS] * dials
        await two_turns(line, other)
        assert [c.query["voice"] for c in line.server.connections] == ["mine"] * dials + ["ara"]
        await tts.aclose()
        await other.aclose()
        await all_closed(line.server)
    xai_pool_patch.uninstall()


@needs_native_pool
async def test_a_connect_method_may_be_set_and_removed_between_turns(patched: None) -> None:
    """While it is set, the native pool serves that TTS, and reuses."""
    async with line_to() as line:
        tts: Any = line.tts()
        await two_turns(line, tts)
        calls: list[Any] = []
        dial = tts._connect_ws

        def mine(*args: Any) -> Any:
            calls.append(args)
            return dial(*args)

        tts._connect_ws = mine
        await two_turns(line, tts)
        assert (len(calls), len(line.server.connections)) == (1, 2)
        del tts._connect_ws
        await two_turns(line, tts)
        assert (len(calls), len(line.server.connections)) == (1, 2)
        assert [metric.connection_reused for metric in line.metrics[-2:]] == [True, True]
        await tts.aclose()
        await all_closed(line.server)


@needs_native_pool
async def test_a_pool_set_on_an_instance_is_used(patched: None) -> None:
    """Also in place of one that the patch has replaced."""

    class Own(ConnectionPool[Any]):
        pass

    async with line_to() as line:
        tts: Any = line.tts()
        await two_turns(line, tts)
        before = vars(tts)["_pool"]
        tts._pool = own = Own(connect_cb=tts._connect_pooled_ws, close_cb=tts._close_pooled_ws)
        assert tts._pool is own
        assert vars(before).keys().isdisjoint({"put", "remove"})
        await two_turns(line, tts)
        assert len(line.server.connections) == 2
        await tts.aclose()
        await all_closed(line.server)


async def test_a_copied_tts_shares_and_leaves_connections_like_any_other(patched: None) -> None:
    """P10: each unregisters by itself."""
    async with line_to() as line:
        tts = line.tts()
        await two_turns(line, tts)
        twin = copy.copy(tts)
        await two_turns(line, twin)
        assert len(line.server.connections) == 1
        await tts.aclose()
        await two_turns(line, twin)
        assert len(line.server.connections) == 1
        await twin.aclose()
        await all_closed(line.server)


# Wrappers of everything


METHODS = [("TTS", name) for name in ("aclose", "prewarm", "synthesize")]
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
async def test_wrappers_and_the_patch_can_be_added_and_removed_in_any_order(
    wrap: Any, theirs_first: bool, theirs_off_first: bool
) -> None:
    """A1: both work while they are there, and the patch can be installed again."""
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

    unpatched = 1 if HAS_NATIVE_POOL else 3
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
