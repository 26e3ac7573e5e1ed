"""A1, A4, A5: putting the patch in and taking it out."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import subprocess
import sys
import types
from typing import Any

import pytest
import wrapt
from livekit.plugins import xai
from livekit.plugins.xai import tts as plugin_module

import xai_pool_patch
from tests.kit import Heard, all_closed, line_to, quick, speak
from xai_pool_patch import (
    AlreadyInstalledError,
    InvalidOptionError,
    PoolOptions,
    UnsupportedPluginError,
)
from xai_pool_patch.demo.standin import End
from xai_pool_patch.plugin import Shape, check_module

CLASSES = (plugin_module.TTS, plugin_module.SynthesizeStream)


def plugin_as_it_is() -> list[dict[str, Any]]:
    return [dict(vars(owner)) for owner in CLASSES]


def test_on_off_on_gives_the_plugin_back() -> None:
    """Everything in the plugin's classes is afterwards the very object it was before."""
    before = plugin_as_it_is()
    for _ in range(3):
        xai_pool_patch.install()
        assert xai_pool_patch.is_installed()
        assert plugin_as_it_is() != before
        xai_pool_patch.uninstall()
        assert not xai_pool_patch.is_installed()
        assert plugin_as_it_is() == before


def test_installing_twice_is_once() -> None:
    """With the same options the second call changes nothing, so that one uninstall() undoes it."""
    before = plugin_as_it_is()
    xai_pool_patch.install()
    during = plugin_as_it_is()
    xai_pool_patch.install(PoolOptions())
    assert plugin_as_it_is() == during
    xai_pool_patch.uninstall()
    xai_pool_patch.uninstall()
    assert plugin_as_it_is() == before


def test_installing_with_other_options_says_what_to_do(patched: None) -> None:
    """Two parts of an application that disagree are told so, and the first stays."""
    with pytest.raises(AlreadyInstalledError, match=r"max_age=600.*call uninstall\(\) first"):
        xai_pool_patch.install(PoolOptions(max_age=600))
    assert xai_pool_patch.is_installed()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"options": {"max_age": 5}}, "options must be PoolOptions or None"),
        ({"on_unsupported": "ignore"}, "on_unsupported must be 'raise' or 'skip', not 'ignore'"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, Any], message: str) -> None:
    """Each is named, and nothing is installed."""
    with pytest.raises(InvalidOptionError, match=message):
        xai_pool_patch.install(**kwargs)


@pytest.mark.parametrize("value", ["off", "OFF", " off "])
def test_switched_off_by_the_environment(
    value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator takes the patch out without a deploy, and the log says so."""
    monkeypatch.setenv("XAI_POOL_PATCH", value)
    before = plugin_as_it_is()
    xai_pool_patch.install()
    assert plugin_as_it_is() == before
    assert not xai_pool_patch.is_installed()
    [record] = caplog.records
    assert record.getMessage() == "not installed, switched off by the environment"


@pytest.mark.parametrize("version", ["1.5.1", "1.6.5", "1.8.9", "2.0.0", "1.6.0+local"])
def test_a_version_that_was_not_verified(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A5: refused, with what was found and what is supported."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    before = plugin_as_it_is()
    with pytest.raises(UnsupportedPluginError) as refusal:
        xai_pool_patch.install()
    assert f"found livekit-plugins-xai {version}" in str(refusal.value)
    assert "1.5.2 to 1.6.4" in str(refusal.value)
    assert "has a pool of its own" in str(refusal.value)
    assert plugin_as_it_is() == before


def test_skip_logs_and_leaves_the_plugin_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A5: for agents that must start with whatever plugin there is."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9.9")
    before = plugin_as_it_is()
    xai_pool_patch.install(on_unsupported="skip")
    assert plugin_as_it_is() == before
    assert not xai_pool_patch.is_installed()
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "9.9.9" in record.reason  # type: ignore[attr-defined]


def test_no_plugin_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A5: a missing plugin is named as missing."""

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UnsupportedPluginError, match="livekit-plugins-xai is not installed"):
        xai_pool_patch.install()


def edited(owner: str, name: str, function: Any) -> types.ModuleType:
    """The plugin's module with one function replaced, the original left as it is."""
    module = types.ModuleType("edited")
    for original in CLASSES:
        members = {k: v for k, v in vars(original).items() if not k.startswith("__")}
        setattr(module, original.__name__, type(original.__name__, (), members))
    if function is None:
        delattr(getattr(module, owner), name)
    else:
        setattr(getattr(module, owner), name, function)
    return module


async def _takes_more(self: Any, timeout: float, opts: Any, more: Any) -> None: ...


async def _close_without_closing(self: Any, ws: Any) -> None: ...


def _not_a_coroutine(self: Any, timeout: float) -> None: ...


async def _run_with_its_own_pool(self: Any, input_stream: Any, output_emitter: Any) -> None:
    async with self._tts._pool.connection(timeout=self._conn_options.timeout):
        pass


@pytest.mark.parametrize(
    ("owner", "name", "function", "named"),
    [
        ("TTS", "_connect_ws", None, "TTS._connect_ws is missing"),
        ("TTS", "_connect_ws", _takes_more, "TTS._connect_ws takes"),
        ("TTS", "_connect_ws", _not_a_coroutine, "TTS._connect_ws is not a coroutine function"),
        ("TTS", "_close_ws", _close_without_closing, "TTS._close_ws does not use close"),
        ("TTS", "prewarm", _not_a_coroutine, "TTS has a prewarm of its own"),
        (
            "SynthesizeStream",
            "_run_ws",
            _run_with_its_own_pool,
            "SynthesizeStream._run_ws does not use _close_ws, _connect_ws",
        ),
    ],
)
def test_an_edited_plugin_is_refused(owner: str, name: str, function: Any, named: str) -> None:
    """A5: the version alone is not believed; the message names what differs."""
    with pytest.raises(UnsupportedPluginError, match=named):
        check_module(edited(owner, name, function), Shape.READS_OPTIONS)


def test_a_module_with_nothing_in_it_is_refused() -> None:
    """A5: a stub is not a plugin."""
    with pytest.raises(UnsupportedPluginError, match=r"SynthesizeStream._run_ws is missing"):
        check_module(types.ModuleType("empty"), Shape.READS_OPTIONS)


def test_a_failure_half_way_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A1: either all of the plugin is patched or none of it."""
    before = plugin_as_it_is()
    wrap, calls = wrapt.FunctionWrapper, []

    def fail_at_the_third(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("no")
        return wrap(*args, **kwargs)

    monkeypatch.setattr(wrapt, "FunctionWrapper", fail_at_the_third)
    with pytest.raises(RuntimeError):
        xai_pool_patch.install()
    assert plugin_as_it_is() == before
    assert not xai_pool_patch.is_installed()


def test_beneath_somebody_elses_wrapper(caplog: pytest.LogCaptureFixture) -> None:
    """A1: only what is ours is taken out; what is covered passes calls through, and says so."""
    before = plugin_as_it_is()
    xai_pool_patch.install()
    calls = []

    def theirs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        calls.append(args)
        return wrapped(*args, **kwargs)

    ours = vars(xai.TTS)["_connect_ws"]
    cover = wrapt.FunctionWrapper(ours, theirs)
    xai.TTS._connect_ws = cover  # type: ignore[method-assign]
    xai_pool_patch.uninstall()
    assert vars(xai.TTS)["_connect_ws"] is cover
    assert [r.method for r in caplog.records if hasattr(r, "method")] == ["TTS._connect_ws"]

    async def turn() -> None:
        async with line_to() as line:
            tts = line.tts()
            for text in ("One.", "Two."):
                assert (await speak(tts, text)).error is None
            assert len(line.server.connections) == 2, "still pooled"

    asyncio.run(turn())
    assert len(calls) == 2
    xai.TTS._connect_ws = before[0]["_connect_ws"]  # type: ignore[method-assign]
    assert plugin_as_it_is() == before


async def test_above_somebody_elses_wrapper() -> None:
    """A1: a wrapper that was there before ours is called for every dial, and stays."""
    original, calls = xai.TTS._connect_ws, []

    async def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return await original(self, *args, **kwargs)

    theirs.__wrapped__ = original  # type: ignore[attr-defined]
    xai.TTS._connect_ws = theirs  # type: ignore[method-assign]
    try:
        xai_pool_patch.install()
        async with line_to() as line:
            tts = line.tts()
            for text in ("One.", "Two."):
                await speak(tts, text)
            assert len(calls) == 1
            await tts.aclose()
        xai_pool_patch.uninstall()
        assert vars(xai.TTS)["_connect_ws"] is theirs
    finally:
        xai.TTS._connect_ws = original  # type: ignore[method-assign]


async def test_installed_under_a_tts_that_exists_already() -> None:
    """A1: instances made before install() are served too, and after uninstall() as before."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "Before.")
        xai_pool_patch.install()
        await speak(tts, "During, first.")
        await speak(tts, "During, second.")
        xai_pool_patch.uninstall()
        await speak(tts, "After.")
        assert [metric.connection_reused for metric in line.metrics] == [False, False, True, False]
        await all_closed(line.server)
        assert {c.ended for c in line.server.connections} == {End.CLIENT_CLOSE}


async def test_on_off_on_with_streams_in_flight() -> None:
    """A1: what speaks goes on speaking, and no connection is left open by it."""
    async with line_to(quick(pace=5.0, speech_per_character=0.05)) as line:
        tts = line.tts()
        xai_pool_patch.install()
        heard = [Heard() for _ in range(3)]
        turns = []
        for number, one in enumerate(heard):
            turns.append(asyncio.create_task(speak(tts, f"Stream number {number}.", heard=one)))
            await line.server.wait_for(
                lambda s, n=number: (
                    len(s.utterances) == n + 1  # type: ignore[misc]
                    and s.utterances[n].first_audio_at is not None
                )
            )
            if number == 0:
                xai_pool_patch.uninstall()
            elif number == 1:
                xai_pool_patch.install()
        xai_pool_patch.uninstall()
        await asyncio.gather(*turns)
        for number, one in enumerate(heard):
            assert one.error is None
            spoken = line.server.utterance_for(f"Stream number {number}.")
            assert one.samples == {spoken.number}
            assert spoken.finished
        await all_closed(line.server)


async def test_uninstalled_during_a_dial() -> None:
    """A1: who waits for a connection gets it, and it is closed afterwards."""
    async with line_to(round_trip=0.02) as line:
        tts = line.tts()
        xai_pool_patch.install()
        turn = asyncio.create_task(speak(tts, "Hello."))
        await line.server.wait_for(lambda s: s.link.accepted == 1)
        xai_pool_patch.uninstall()
        heard = await turn
        assert heard.samples == {line.server.utterance_for("Hello.").number}
        await all_closed(line.server)


def test_prewarm_without_an_event_loop(patched: None) -> None:
    """The base class's prewarm() did nothing, so a worker's set-up code may call it anywhere."""
    xai.TTS(api_key="key").prewarm()


async def test_prewarm_without_a_job(patched: None, caplog: pytest.LogCaptureFixture) -> None:
    """Where there is no HTTP session there is no connection, but no exception either."""
    caplog.set_level("DEBUG")
    xai.TTS(api_key="key").prewarm()
    assert "prewarm skipped, there is no HTTP session outside a job" in caplog.text


async def test_update_options_before_the_first_use(patched: None) -> None:
    """A TTS that is only being set up dials nothing."""
    async with line_to() as line:
        tts = line.tts()
        tts.update_options(voice="eve")
        heard = await speak(tts, "Hello.")
        assert heard.error is None
        assert [h.query["voice"] for h in line.server.handshakes] == ["eve"]
        await tts.aclose()


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_install_does_not_import_the_plugin_and_catches_its_import() -> None:
    """A1: the import registers the plugin and belongs to the main thread: it is the agent's."""
    done = python(
        "import sys, xai_pool_patch\n"
        "xai_pool_patch.install()\n"
        "assert not any(name.startswith('livekit') for name in sys.modules), 'imported'\n"
        "from livekit.plugins import xai\n"
        "assert 'prewarm' in vars(xai.TTS), 'not patched'\n"
        "xai_pool_patch.uninstall()\n"
        "assert 'prewarm' not in vars(xai.TTS), 'not undone'\n"
    )
    assert done.returncode == 0, done.stderr


def test_uninstall_before_the_import_leaves_the_plugin_alone() -> None:
    """A1: an installation that was taken back does not come true later."""
    done = python(
        "import xai_pool_patch\n"
        "xai_pool_patch.install()\n"
        "xai_pool_patch.uninstall()\n"
        "from livekit.plugins import xai\n"
        "assert 'prewarm' not in vars(xai.TTS)\n"
        "xai_pool_patch.install()\n"
        "assert 'prewarm' in vars(xai.TTS)\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_refusal_at_import_does_not_break_the_import() -> None:
    """The application keeps its agent; the log says why it is not faster."""
    done = python(
        "import logging, xai_pool_patch, xai_pool_patch.plugin as plugin\n"
        "logging.basicConfig(format='%(name)s %(levelname)s %(message)s %(reason)s')\n"
        "xai_pool_patch.install()\n"
        "plugin.VERIFIED.clear()\n"
        "methods = plugin._methods\n"
        "plugin._methods = lambda shape: [plugin._Method('TTS', 'missing')]\n"
        "from livekit.plugins import xai\n"
        "assert 'prewarm' not in vars(xai.TTS)\n"
        "assert not xai_pool_patch.is_installed()\n"
    )
    assert done.returncode == 0, done.stderr
    assert "xai_pool_patch ERROR not installed" in done.stderr
    assert "TTS.missing is missing" in done.stderr
