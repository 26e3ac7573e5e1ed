"""Utterances without words: the protocol does not say what the server answers.

Whatever it is, the caller hears, and the server gets, the same as without the patch.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from livekit.agents import APIConnectOptions

import xai_pool_patch
from tests.kit import ONCE, Line, line_to, quick, round_trips_are_known, speak
from tests.live.peer import until
from xai_pool_patch.testing import Utterance, Wordless

RETRYING = APIConnectOptions(max_retry=2, retry_interval=0.01, timeout=5.0)
WORDS = "And now a few words."


@dataclass
class Outcome:
    """What became of an utterance without a word."""

    error: str | None
    """What the caller gets."""
    error_events: int
    hundredths: int
    """Of a second, of what is heard."""
    sent: list[tuple[str, bool]]
    """The text of each utterance that the server was sent, and whether it was whole."""
    handshakes: int = field(default=0, compare=False)
    """For it and for the turn that follows."""


async def converse(text: str, wordless: Wordless, options: APIConnectOptions, warm: int) -> Outcome:
    """One turn without a word, and one with. `warm` turns at once come before them, and leave as
    many connections idle where these are kept."""
    async with line_to(quick(wordless=wordless), 0.01) as line:
        tts = line.tts()
        await asyncio.gather(*(speak(tts, f"Stream {n}.") for n in range(warm)))
        if xai_pool_patch.is_installed():
            await until(lambda: xai_pool_patch.stats()["idle"] == warm)
            await until(round_trips_are_known)
        handshakes, utterances = len(line.server.handshakes), len(line.server.utterances)
        heard = await speak(tts, text, options)
        sent = line.server.utterances[utterances:]
        assert heard.samples <= {utterance.number for utterance in sent}
        if xai_pool_patch.is_installed():
            assert unused_are_open(line, warm, sent)
        outcome = Outcome(
            error=repr(heard.error),
            error_events=len(line.errors),
            hundredths=round(heard.seconds * 100),
            sent=[(utterance.text, utterance.text_done) for utterance in sent],
        )
        after = await speak(tts, WORDS)
        assert after.error is None
        assert after.samples == {line.server.utterance_for(WORDS).number}
        wanted = len("".join(WORDS.split())) * line.server.behaviour.speech_per_character
        # The framework may end a sentence with a hundredth of a second of silence.
        assert after.seconds == pytest.approx(wanted, abs=0.011)
        assert len(line.server.utterances) == utterances + len(sent) + 1
        outcome.handshakes = len(line.server.handshakes) - handshakes
        await tts.aclose()
    return outcome


def unused_are_open(line: Line, warm: int, sent: list[Utterance]) -> bool:
    used = {utterance.connection for utterance in sent}
    return all(c.is_open for c in line.server.connections[:warm] if c.number not in used)


@pytest.mark.parametrize("warm", [0, 3], ids=["cold", "reused"])
@pytest.mark.parametrize("options", [ONCE, RETRYING], ids=["once", "retrying"])
@pytest.mark.parametrize("text", [" \n ", "\u2026", "?! ..."], ids=["blank", "dots", "signs"])
@pytest.mark.parametrize("wordless", [Wordless.DONE, Wordless.SILENCE, Wordless.REFUSED])
async def test_an_utterance_without_words_goes_as_without_the_patch(
    wordless: Wordless, text: str, options: APIConnectOptions, warm: int
) -> None:
    """It is sent as often, heard for as long, and fails or not."""
    unpatched = await converse(text, wordless, options, warm)
    xai_pool_patch.install()
    patched = await converse(text, wordless, options, warm)
    xai_pool_patch.uninstall()
    assert patched == unpatched
    if wordless is Wordless.REFUSED:
        assert patched.handshakes <= unpatched.handshakes
    else:
        assert patched.handshakes == (0 if warm else 1)


async def test_words_after_an_error_on_punctuation_are_spoken(patched: None) -> None:
    """An error that answers only punctuation is that of a dead session, so it is replayed."""
    async with line_to(quick(), 0.01) as line:
        tts, behaviour = line.tts(), line.server.behaviour
        await speak(tts, "Before.")
        await until(round_trips_are_known)
        behaviour.error_on_text = "Deadline expired"
        async with tts.stream(conn_options=ONCE) as stream:
            stream.push_text("... And ")
            await line.server.wait_for(lambda s: s.utterances[1:])
            assert line.server.utterances[1].text == "..."
            behaviour.error_on_text = None
            await line.server.wait_for(lambda s: s.utterances[2:])
            stream.push_text("now.")
            stream.end_input()
            samples = {s async for event in stream for s in event.frame.data if s}
        assert samples == {line.server.utterance_for("... And now.").number}
        assert line.errors == []
        await tts.aclose()
