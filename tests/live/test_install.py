"""A1, A4, A5: `install()` and `uninstall()`."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import re
import sys
import threading
import types
from typing import Any

import pytest
import wrapt
from livekit.agents import AgentSession
from livekit.plugins import xai
from livekit.plugins.xai import tts as plugin_module

import xai_pool_patch
from tests.kit import (
    HAS_NATIVE_POOL,
    SHAPE,
    VERSION,
    Heard,
    all_closed,
    event_of,
    line_to,
    python,
    quick,
    registry,
    speak,
)
from xai_pool_patch import (
    AlreadyInstalledError,
    InvalidOptionError,
    PoolOptions,
    UnsupportedPluginError,
    installation,
)
from xai_pool_patch import registry as registry_of
from xai_pool_patch.plugin import looks, patching, releases
from xai_pool_patch.protocol.request import Request
from xai_pool_patch.testing import End

CLASSES = (plugin_module.TTS, plugin_module.SynthesizeStream, AgentSession)
STEPS = 7 if HAS_NATIVE_POOL else 9
"""Of uninstall(): so many attributes are patched, and then there are the pools."""


def plugin_as_it_is() -> list[dict[str, Any]]:
    return [dict(vars(owner)) for owner in CLASSES]


def test_uninstall_restores_the_plugin_exactly() -> None:
    """Every attribute of its classes is the very object it was before, also the third time."""
    before = plugin_as_it_is()
    for _ in range(3):
        xai_pool_patch.install()
        assert xai_pool_patch.is_installed()
        assert plugin_as_it_is() != before
        xai_pool_patch.uninstall()
        assert not xai_pool_patch.is_installed()
        assert plugin_as_it_is() == before


def test_a_second_install_with_the_same_options_changes_nothing() -> None:
    """So one uninstall() undoes both."""
    before = plugin_as_it_is()
    xai_pool_patch.install()
    during = plugin_as_it_is()
    xai_pool_patch.install(PoolOptions())
    assert plugin_as_it_is() == during
    xai_pool_patch.uninstall()
    xai_pool_patch.uninstall()
    assert plugin_as_it_is() == before


def test_a_second_install_with_other_options_raises(patched: None) -> None:
    """The error names what differs and says what to do, and the first installation stays."""
    with pytest.raises(AlreadyInstalledError) as refusal:
        xai_pool_patch.install(PoolOptions(max_age=600, heartbeat=5))
    assert str(refusal.value) == (
        f"already installed with max_age={PoolOptions().max_age}, not 600; heartbeat=20.0, not 5;"
        " to change that, call uninstall() first, or install() only once"
    )
    assert xai_pool_patch.is_installed()


def test_what_differs_is_named_without_a_password(patched: None) -> None:
    """A URL may contain one."""
    with pytest.raises(AlreadyInstalledError, match="with another redis_url;") as refusal:
        xai_pool_patch.install(PoolOptions(redis_url="redis://user:secret@localhost"))
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"options": {"max_age": 5}}, "options must be PoolOptions or None"),
        ({"allow_unverified": "1.8.10"}, "allow_unverified must be True or False, not '1.8.10'"),
        ({"on_unsupported": "ignore"}, "on_unsupported must be 'raise' or 'skip', not 'ignore'"),
    ],
)
def test_wrong_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    """And nothing is installed."""
    with pytest.raises(InvalidOptionError, match=message):
        xai_pool_patch.install(**kwargs)


@pytest.mark.parametrize("value", ["off", "OFF", " off ", "0", "false", "False", "no"])
def test_the_environment_variable_switches_the_patch_off(
    value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator needs no deploy for it, and the log says so."""
    monkeypatch.setenv("XAI_POOL_PATCH", value)
    before = plugin_as_it_is()
    xai_pool_patch.install()
    assert plugin_as_it_is() == before
    assert not xai_pool_patch.is_installed()
    [record] = caplog.records
    assert event_of(record) == "switched off by XAI_POOL_PATCH"


@pytest.mark.parametrize("value", ["", "on", "1", "true", "offline"])
def test_no_other_value_switches_it_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may use the variable for what he believes it to be."""
    monkeypatch.setenv("XAI_POOL_PATCH", value)
    xai_pool_patch.install()
    assert xai_pool_patch.is_installed()
    xai_pool_patch.uninstall()


def test_a_patch_that_a_parent_process_installed_is_switched_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the next install(). The log, is_installed() and the plugin agree."""
    before = plugin_as_it_is()
    xai_pool_patch.install()
    monkeypatch.setenv("XAI_POOL_PATCH", "off")
    xai_pool_patch.install()
    assert event_of(caplog.records[-1]) == "switched off by XAI_POOL_PATCH"
    assert not xai_pool_patch.is_installed()
    assert plugin_as_it_is() == before


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Let the metadata say other versions, by the distribution's last word. None: no metadata."""
    version_of = importlib.metadata.version

    def pretended(name: str) -> str:
        version = versions.get(name.rpartition("-")[2], version_of(name))
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", pretended)


@pytest.fixture(params=["1.5.1", "1.8.10", "1.9.0", "2.0.0", f"{VERSION}+local"])
def unverified(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A version that is not in the table, with the look of one that is."""
    pretend(monkeypatch, xai=request.param)
    return str(request.param)


def test_an_unverified_version_is_refused(unverified: str) -> None:
    """A5: the error says what was found, what is verified, and how to install all the same."""
    before = plugin_as_it_is()
    with pytest.raises(UnsupportedPluginError) as refusal:
        xai_pool_patch.install()
    assert f"found livekit-plugins-xai {unverified};" in str(refusal.value)
    assert "1.5.2 to 1.8.9" in str(refusal.value)
    assert f"looks the same ({SHAPE.value}): install(allow_unverified=True)" in str(refusal.value)
    assert plugin_as_it_is() == before
    xai_pool_patch.install(allow_unverified=True)
    assert plugin_as_it_is() != before
    xai_pool_patch.uninstall()
    assert plugin_as_it_is() == before


def test_an_unverified_version_that_differs_is_always_refused(
    unverified: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A5: allow_unverified is for those that look the same. The error names what differs."""
    monkeypatch.setattr(plugin_module.TTS, "_connect_ws", _takes_more)
    before = plugin_as_it_is()
    with pytest.raises(UnsupportedPluginError, match=r"differs from .* TTS\._connect_ws takes"):
        xai_pool_patch.install(allow_unverified=True)
    assert plugin_as_it_is() == before


def test_on_unsupported_skip_logs_and_leaves_the_plugin_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A5: for agents that must start with whatever plugin there is."""
    pretend(monkeypatch, xai="9.9.9")
    before = plugin_as_it_is()
    xai_pool_patch.install(on_unsupported="skip")
    assert plugin_as_it_is() == before
    assert not xai_pool_patch.is_installed()
    [record] = caplog.records
    assert (event_of(record), record.levelno) == ("plugin not supported", logging.WARNING)
    assert "9.9.9" in record.xai_pool_reason  # type: ignore[attr-defined]


@pytest.mark.parametrize("version", ["1.5.0", "1.8.10", "1.9.0rc1", "1.99.0"])
def test_any_version_of_livekit_agents_that_looks_the_same_is_accepted(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A5: pip installs the newest one beside a plugin that is pinned."""
    pretend(monkeypatch, agents=version)
    xai_pool_patch.install()
    assert hasattr(xai.TTS.aclose, "__wrapped__")
    xai_pool_patch.uninstall()
    releases.check_files(VERSION, allow_unverified=False)  # as before the import


@pytest.mark.parametrize("allow_unverified", [False, True])
def test_the_next_major_version_of_livekit_agents_is_refused(
    allow_unverified: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A5: whatever it looks like."""
    pretend(monkeypatch, agents="2.0.0b1")
    before = plugin_as_it_is()
    with pytest.raises(UnsupportedPluginError, match=r"livekit-agents 2\.0\.0b1.*not below 2"):
        xai_pool_patch.install(allow_unverified=allow_unverified)
    assert plugin_as_it_is() == before


class _OtherStream:
    """A `ChunkedStream` that knows no such metrics."""

    def __init__(self) -> None: ...

    def _run(self, output_emitter: Any) -> None: ...


@pytest.mark.parametrize("allow_unverified", [False, True])
def test_livekit_agents_that_look_different_are_refused(
    allow_unverified: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A5: one error names all that differs; allow_unverified is for the plugin."""
    before = plugin_as_it_is()
    monkeypatch.setattr("livekit.agents.tts.ChunkedStream", _OtherStream)
    monkeypatch.delattr("livekit.agents.get_job_context")
    with pytest.raises(UnsupportedPluginError) as refusal:
        xai_pool_patch.install(allow_unverified=allow_unverified)
    for named in (
        f"found livekit-agents {importlib.metadata.version('livekit-agents')}, which differs",
        "ChunkedStream.__init__ does not use _acquire_time, _connection_reused;",
        "ChunkedStream._run is not a coroutine function",
        "get_job_context is missing",
    ):
        assert named in str(refusal.value)
    assert plugin_as_it_is() == before


@pytest.mark.skipif(not HAS_NATIVE_POOL, reason="this plugin does not use it")
def test_another_native_pool_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A5: the plugin's pool is a class of livekit-agents."""
    monkeypatch.delattr("livekit.agents.utils.ConnectionPool._drain_to_close")
    with pytest.raises(UnsupportedPluginError, match=r"ConnectionPool\._drain_to_close is missing"):
        xai_pool_patch.install()


def test_a_missing_plugin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A5: the error says that it is not installed."""
    pretend(monkeypatch, xai=None)
    monkeypatch.setitem(releases.PACKAGES, releases.DISTRIBUTION, "livekit.plugins.absent")
    with pytest.raises(UnsupportedPluginError, match="livekit-plugins-xai is not installed"):
        xai_pool_patch.install()


@pytest.mark.parametrize("said_by", ["the package", "its module"])
def test_a_plugin_without_metadata_says_its_version(
    said_by: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a frozen application. It is no reason to refuse it, nor livekit-agents."""
    caplog.set_level("INFO")
    pretend(monkeypatch, xai=None, agents=None)
    if said_by == "its module":
        monkeypatch.delattr(xai, "__version__")
    xai_pool_patch.install()
    assert vars(caplog.records[-1])["xai_pool_plugin"] == VERSION
    xai_pool_patch.uninstall()


class _Broken:
    """A finder that raises, as those of some frozen applications do for what they do not know."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        raise OSError(name)


def test_files_that_cannot_be_read_are_checked_at_the_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the version is known before it."""
    for name in [name for name in sys.modules if name.startswith("livekit.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Broken()])
    assert looks.code_of(releases.MODULE) is None
    releases.check_files(VERSION, allow_unverified=False)
    releases.check_files("1.8.99", allow_unverified=True)
    with pytest.raises(UnsupportedPluginError, match=r"found livekit-plugins-xai 1\.8\.99;"):
        releases.check_files("1.8.99", allow_unverified=False)


def test_a_plugin_that_does_not_say_its_version_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error says that it is the metadata that are missing, and what to do."""
    pretend(monkeypatch, xai=None)
    monkeypatch.delattr(xai, "__version__")
    monkeypatch.setattr(releases, "code_of", lambda name: None)
    with pytest.raises(UnsupportedPluginError, match=r"metadata are missing.*--copy-metadata"):
        xai_pool_patch.install()


@pytest.mark.parametrize("allow_unverified", [False, True])
def test_an_unsupported_python_is_refused(
    allow_unverified: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the arguments, since nobody has tried the plugin on it. "skip" logs it."""
    monkeypatch.setattr("xai_pool_patch.python.LAST", (3, 9))
    found = ".".join(map(str, sys.version_info[:3]))
    reason = f"found Python {found}; xai_pool_patch supports 3.10 to 3.14"
    before = plugin_as_it_is()
    with pytest.raises(UnsupportedPluginError, match=f"^{re.escape(reason)}$"):
        xai_pool_patch.install(allow_unverified=allow_unverified)
    xai_pool_patch.install(allow_unverified=allow_unverified, on_unsupported="skip")
    [record] = caplog.records
    assert (event_of(record), record.levelno) == ("plugin not supported", logging.WARNING)
    assert vars(record)["xai_pool_reason"] == reason
    assert plugin_as_it_is() == before


def edited(owner: str, name: str, function: Any) -> types.ModuleType:
    """The plugin's module with one function replaced, the original left as it is."""
    module = types.ModuleType("edited")
    for original in CLASSES:
        entries = {k: v for k, v in vars(original).items() if not k.startswith("__")}
        setattr(module, original.__name__, type(original.__name__, (), entries))
    if function is None:
        delattr(getattr(module, owner), name)
    else:
        setattr(getattr(module, owner), name, function)
    return module


async def _takes_more(self: Any, timeout: float, opts: Any, more: Any) -> None: ...


async def _close_without_closing(self: Any, ws: Any) -> None: ...


def _close_plainly(self: Any, ws: Any) -> None: ...


async def _run_otherwise(self: Any, input_stream: Any, output_emitter: Any) -> None: ...


def refusal_of(module: types.ModuleType) -> str:
    with pytest.raises(UnsupportedPluginError) as refusal:
        releases.detect(module, VERSION, allow_unverified=True)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("owner", "name", "function", "named"),
    [
        ("TTS", "_connect_ws", None, "TTS._connect_ws is missing"),
        ("TTS", "_connect_ws", _takes_more, "TTS._connect_ws takes"),
        ("TTS", "_close_ws", _close_plainly, "TTS._close_ws is not a coroutine function"),
        ("TTS", "_close_ws", _close_without_closing, "TTS._close_ws does not use close"),
        ("SynthesizeStream", "_run_ws", _run_otherwise, "SynthesizeStream._run_ws does not use _"),
    ],
)
def test_an_edited_plugin_is_refused(owner: str, name: str, function: Any, named: str) -> None:
    """A5: its version alone is not enough. The error names what differs."""
    message = refusal_of(edited(owner, name, function))
    assert f"livekit-plugins-xai {VERSION} is not what its version says" in message
    assert named in message


@pytest.mark.parametrize("shape", [shape for shape in releases.Shape if shape is not SHAPE])
@pytest.mark.parametrize("seen", ["imported", "in its file"])
def test_no_shape_passes_for_another(shape: releases.Shape, seen: str) -> None:
    """However much they have in common, before the import as after it."""
    code = looks.code_of(releases.MODULE)
    assert code is not None
    view = looks.Imported(plugin_module) if seen == "imported" else looks.InFile(code)
    assert releases.differences(view, SHAPE) == []
    assert releases.differences(view, shape) != []


def test_an_empty_module_is_refused() -> None:
    """A5: a stub is not a plugin."""
    assert "SynthesizeStream._run_ws is missing" in refusal_of(types.ModuleType("empty"))


def faults(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What failed, as it was logged."""
    records = [r for r in caplog.records if r.levelname == "ERROR"]
    return [vars(record)["xai_pool_operation"] for record in records]


def test_an_install_that_fails_half_way_is_rolled_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A1, A4: all of the plugin is patched or nothing, and the agent starts in any case."""
    before = plugin_as_it_is()
    wrap, calls = patching.Wrapper, []

    def fail_at_the_second(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("no")
        return wrap(*args, **kwargs)

    monkeypatch.setattr(patching, "Wrapper", fail_at_the_second)
    xai_pool_patch.install()
    assert faults(caplog) == ["install"]
    assert plugin_as_it_is() == before
    assert not xai_pool_patch.is_installed()


@pytest.mark.parametrize("fails_at", range(1, STEPS + 1))
async def test_an_uninstall_that_fails_half_way_finishes(
    fails_at: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A1: each step runs, whatever another raises, and the fault is logged after the last one."""
    before = plugin_as_it_is()
    undo, close, steps = patching.Patch.undo, registry_of.Registry.close, []

    def counted(step: Any) -> Any:
        def take(of: Any) -> None:
            steps.append(of)
            step(of)
            if len(steps) == fails_at:
                raise ZeroDivisionError

        return take

    async with line_to() as line:
        xai_pool_patch.install()
        tts = line.tts()
        await speak(tts, "Hello.")
        monkeypatch.setattr(patching.Patch, "undo", counted(undo))
        monkeypatch.setattr(registry_of.Registry, "close", counted(close))
        xai_pool_patch.uninstall()
        assert faults(caplog) == ["uninstall"]
        assert len(steps) == STEPS
        assert plugin_as_it_is() == before
        assert not xai_pool_patch.is_installed()
        await all_closed(line.server)
        await tts.aclose()


class NotingLock:
    """A lock that notes when a thread has to wait for it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.is_awaited = threading.Event()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.is_awaited.set()
            self._lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self._lock.release()


def test_an_install_during_an_uninstall_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A1: in two threads."""
    before, lock, undo = plugin_as_it_is(), NotingLock(), patching.Patch.undo

    def install() -> None:
        xai_pool_patch.install()
        lock.is_awaited.set()  # it has not had to wait, and is through

    other = threading.Thread(target=install)

    def half_way(record: patching.Patch) -> None:
        undo(record)
        if other.ident is None:
            other.start()
            assert lock.is_awaited.wait(timeout=10.0)

    monkeypatch.setattr(installation, "_lock", lock)
    monkeypatch.setattr(patching.Patch, "undo", half_way)
    xai_pool_patch.install()
    xai_pool_patch.uninstall()
    other.join()
    assert xai_pool_patch.is_installed()
    xai_pool_patch.uninstall()
    assert plugin_as_it_is() == before


async def connections_of_two_turns() -> int:
    async with line_to() as line:
        tts = line.tts()
        for text in ("One.", "Two."):
            assert (await speak(tts, text)).error is None
        await tts.aclose()
        return len(line.server.connections)


async def test_a_patch_under_a_foreign_wrapper_stays_and_passes_calls_through(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A1: uninstall() takes out only what is on top, and logs what it has to leave."""
    before, connections = plugin_as_it_is(), await connections_of_two_turns()
    xai_pool_patch.install()
    calls = []

    def theirs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        calls.append(args)
        return wrapped(*args, **kwargs)

    stream_type: Any = plugin_module.SynthesizeStream
    original, ours = before[1]["_run_ws"], vars(stream_type)["_run_ws"]
    cover = wrapt.FunctionWrapper(ours, theirs)
    stream_type._run_ws = cover
    assert await connections_of_two_turns() == 1
    xai_pool_patch.uninstall()
    assert vars(stream_type)["_run_ws"] is cover
    covered = [r.xai_pool_attribute for r in caplog.records if hasattr(r, "xai_pool_attribute")]
    assert covered == ["SynthesizeStream._run_ws"]
    assert await connections_of_two_turns() == connections
    assert len(calls) == 4
    stream_type._run_ws = original
    assert plugin_as_it_is() == before


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_foreign_wrapper_of_connect_is_called_for_every_dial(when: str) -> None:
    """A1: whether it was there before or came later. uninstall() leaves it in place."""
    original, calls = xai.TTS._connect_ws, []

    async def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return await wrapped(self, *args, **kwargs)

    theirs.__wrapped__ = original  # type: ignore[attr-defined]
    try:
        if when == "after":
            xai_pool_patch.install()
        wrapped = xai.TTS._connect_ws
        xai.TTS._connect_ws = theirs  # type: ignore[method-assign]
        xai_pool_patch.install()
        is_pooled = HAS_NATIVE_POOL or when == "after"
        assert await connections_of_two_turns() == (1 if is_pooled else 2)
        assert len(calls) >= 1
        xai_pool_patch.uninstall()
        assert vars(xai.TTS)["_connect_ws"] is theirs
    finally:
        xai.TTS._connect_ws = original  # type: ignore[method-assign]


async def test_existing_instances_are_patched_and_restored() -> None:
    """A1: those made before install() use the pool until uninstall()."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "Before.")
        xai_pool_patch.install()
        await speak(tts, "During, first.")
        await line.server.wait_for(lambda s: s.connections[0].ended is not None)
        await speak(tts, "During, second.")
        xai_pool_patch.uninstall()
        await line.server.wait_for(lambda s: s.open_count == 0)
        await speak(tts, "After, first.")
        await speak(tts, "After, second.")
        reused = [metric.connection_reused for metric in line.metrics]
        assert reused == [False, False, True, False, HAS_NATIVE_POOL]
        await tts.aclose()
        await all_closed(line.server)
        assert {c.ended for c in line.server.connections} == {End.CLIENT_CLOSE}


async def test_streams_go_on_through_install_and_uninstall() -> None:
    """A1: each is heard whole, and no connection stays open."""
    async with line_to(quick(pace=5.0, speech_per_character=0.05)) as line:
        tts = line.tts()
        heard = [Heard() for _ in range(5)]
        turns = []
        for number, one in enumerate(heard):
            turns.append(asyncio.create_task(speak(tts, f"Stream number {number}.", heard=one)))
            await line.server.wait_for(
                lambda s, n=number: (
                    len(s.utterances) == n + 1  # type: ignore[misc]
                    and s.utterances[n].first_audio_at is not None
                )
            )
            if number % 2 == 0:
                xai_pool_patch.install()
            else:
                xai_pool_patch.uninstall()
        await asyncio.gather(*turns)
        for number, one in enumerate(heard):
            assert one.error is None
            spoken = line.server.utterance_for(f"Stream number {number}.")
            assert one.samples == {spoken.number}
            assert spoken.finished
        await speak(tts, "Afterwards.")
        # Neither the pools of the installations that are over hold a connection, nor the plugin's.
        await line.server.wait_for(lambda s: s.open_count == 1)
        xai_pool_patch.uninstall()
        await all_closed(line.server)
        await tts.aclose()
        assert {c.ended for c in line.server.connections} == {End.CLIENT_CLOSE}


async def test_a_dial_under_way_serves_its_turn_after_uninstall() -> None:
    """A1: the connection is closed after the turn."""
    async with line_to(round_trip=0.02) as line:
        tts = line.tts()
        xai_pool_patch.install()
        turn = asyncio.create_task(speak(tts, "Hello."))
        await line.server.wait_for(lambda s: s.network.accepted == 1)
        xai_pool_patch.uninstall()
        heard = await turn
        assert heard.samples == {line.server.utterance_for("Hello.").number}
        await all_closed(line.server)


async def test_a_pool_made_during_an_uninstall_closes_by_itself() -> None:
    """A1: uninstall() has not seen its loop, so nothing else would close it."""
    async with line_to() as line:
        xai_pool_patch.install()
        late = registry()
        xai_pool_patch.uninstall()
        request = Request(line.http, ("wss://api.x.ai/v1/tts",), {}, max_age=540.0)
        pool = late.here().register(line.tts(), request)
        assert not pool.is_closed
        await asyncio.sleep(0)
        assert pool.is_closed
        assert line.server.handshakes == []


def test_prewarm_without_an_event_loop_does_nothing(patched: None) -> None:
    """As in the base class, so a worker's set-up code may call it anywhere."""
    xai.TTS(api_key="key").prewarm()


async def test_prewarm_outside_of_a_job_is_logged_and_skipped(
    patched: None, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no HTTP session to dial with."""
    caplog.set_level("DEBUG")
    xai.TTS(api_key="key").prewarm()
    [record] = [r for r in caplog.records if event_of(r) == "prewarm skipped"]
    assert record.xai_pool_reason == "there is no HTTP session outside a job"  # type: ignore[attr-defined]


async def test_update_options_before_the_first_use_dials_nothing(patched: None) -> None:
    """The TTS is only being set up."""
    async with line_to() as line:
        tts = line.tts()
        tts.update_options(voice="eve")
        heard = await speak(tts, "Hello.")
        assert heard.error is None
        assert [h.query["voice"] for h in line.server.handshakes] == ["eve"]
        await tts.aclose()


def test_install_before_the_import_patches_the_plugin_when_it_is_imported() -> None:
    """A1: it does not import the plugin itself. The import registers it, in the agent's main
    thread."""
    done = python(
        "import sys, xai_pool_patch\n"
        "xai_pool_patch.install()\n"
        "heavy = ('livekit.agents', 'livekit.plugins.', 'aiohttp', 'opentelemetry')\n"
        "assert not [name for name in sys.modules if name.startswith(heavy)], 'imported'\n"
        "from livekit.plugins import xai\n"
        "assert hasattr(xai.TTS.aclose, '__wrapped__'), 'not patched'\n"
        "xai_pool_patch.uninstall()\n"
        "assert not hasattr(xai.TTS.aclose, '__wrapped__'), 'not undone'\n"
    )
    assert done.returncode == 0, done.stderr
