"""Follows xAI's protocol on one connection. This module does no I/O: frames in, a stage out.

xAI's audio carries no utterance id. Only two frames show that nothing more will come for an
utterance: its `audio.done`, received after its `text.done` was sent, and the `audio.clear` that
answers a `text.clear`.
"""

from __future__ import annotations

import enum
import json
import re
from typing import Any


class Stage(enum.Enum):
    """What the server still owes this connection."""

    CLEAN = "clean"
    """Nothing: every utterance has been answered in full, or cleared."""
    ASKED = "asked"
    """Audio for the text sent so far. None has come yet, and more text may follow."""
    SPEAKING = "speaking"
    """More audio; some has come, and more text may follow."""
    AWAITING = "awaiting"
    """All of the audio and its `audio.done`."""
    FINISHING = "finishing"
    """The rest of the audio and its `audio.done`."""
    EMPTY = "empty"
    """An `audio.done` for an utterance without text."""
    CLEARING = "clearing"
    """The acknowledgement of a `text.clear`. Audio of the utterance may come before it."""
    VERIFYING = "verifying"
    """The acknowledgement of a `text.clear` and nothing else: there is no utterance to cancel."""
    DIRTY = "dirty"
    """Nobody can say. Such a connection never serves another utterance."""


# A frame that is not listed for a stage makes the connection dirty. So does every frame that is
# sent before a clear is acknowledged: there is never more than one clear at a time.
_AFTER_SENDING = {
    (Stage.CLEAN, "text.delta"): Stage.ASKED,
    (Stage.CLEAN, "text.done"): Stage.EMPTY,
    (Stage.ASKED, "text.delta"): Stage.ASKED,
    (Stage.ASKED, "text.done"): Stage.AWAITING,
    (Stage.SPEAKING, "text.delta"): Stage.SPEAKING,
    (Stage.SPEAKING, "text.done"): Stage.FINISHING,
    (Stage.CLEAN, "text.clear"): Stage.VERIFYING,
    (Stage.ASKED, "text.clear"): Stage.CLEARING,
    (Stage.SPEAKING, "text.clear"): Stage.CLEARING,
    (Stage.AWAITING, "text.clear"): Stage.CLEARING,
    (Stage.FINISHING, "text.clear"): Stage.CLEARING,
    (Stage.EMPTY, "text.clear"): Stage.CLEARING,
}
_AFTER_RECEIVING = {
    (Stage.ASKED, "audio.delta"): Stage.SPEAKING,
    (Stage.SPEAKING, "audio.delta"): Stage.SPEAKING,
    (Stage.AWAITING, "audio.delta"): Stage.FINISHING,
    (Stage.FINISHING, "audio.delta"): Stage.FINISHING,
    (Stage.FINISHING, "audio.done"): Stage.CLEAN,
    (Stage.EMPTY, "audio.delta"): Stage.FINISHING,
    (Stage.EMPTY, "audio.done"): Stage.CLEAN,
    (Stage.CLEARING, "audio.delta"): Stage.CLEARING,
    (Stage.CLEARING, "audio.done"): Stage.VERIFYING,
    (Stage.CLEARING, "audio.clear"): Stage.CLEAN,
    (Stage.VERIFYING, "audio.clear"): Stage.CLEAN,
}

_DELTA = re.compile(r'\{\s*"type"\s*:\s*"((?:audio|text)\.delta)"\s*,')
"""Detects the most frequent frames without parsing them. If the rest of one is malformed, whoever
parses it reports that, and the pool discards the connection all the same."""

UNREADABLE = "unreadable"
"""The type of a frame that is not a JSON object with a type."""


class UtteranceTracker:
    """Follows one connection from utterance to utterance.

    Attributes:
        was_cleared: a `text.clear` interrupted an utterance on this connection. Only the server's
            acknowledgement says that nothing more comes of it.
        has_words: the utterance has something to speak. xAI does not document whether it answers
            blanks and punctuation by silence, by `audio.done` alone or by an error.
        is_unambiguous: everything from now on is known to answer this utterance.
        is_first: no utterance came before this one, so everything answers this one.
    """

    def __init__(self) -> None:
        self.stage = Stage.CLEAN
        self.was_cleared = False
        self.has_words = False
        self.is_unambiguous = False
        self.is_first = False
        self._is_unused = True

    def __repr__(self) -> str:
        return f"<UtteranceTracker {self.stage.value}>"

    @property
    def is_clean(self) -> bool:
        return self.stage is Stage.CLEAN

    @property
    def awaits_clear(self) -> bool:
        return self.stage in (Stage.CLEARING, Stage.VERIFYING)

    @property
    def _may_stay_silent(self) -> bool:
        """Whether an `audio.done` without audio would belong to this utterance.

        Words are answered by audio, so after words it must belong to another utterance.
        """
        return self.stage is Stage.AWAITING and (self.is_unambiguous or not self.has_words)

    def sent(self, frame: object) -> None:
        """Follow a frame to the server.

        Call this before the send: a send that is cancelled may have left all the same.
        """
        type_ = type_of(frame)
        if self.is_clean:
            self.has_words = self.is_unambiguous = False
            self.is_first, self._is_unused = self._is_unused, False
        if type_ == "text.delta" and not self.has_words:
            self.has_words = any(map(str.isalnum, str(_parsed(frame).get("delta"))))
        self.stage = _AFTER_SENDING.get((self.stage, type_), Stage.DIRTY)
        self.was_cleared |= self.stage is Stage.CLEARING

    def received(self, type_: str) -> bool:
        """Follow a frame from the server. False for audio that nobody asked for."""
        is_answer = type_.startswith("audio.")
        may_be_heard = not (is_answer and self._is_unasked(type_))
        if type_ == "audio.done" and self._may_stay_silent:
            self.stage = Stage.CLEAN
        elif is_answer or type_ in ("error", UNREADABLE):
            self.stage = _AFTER_RECEIVING.get((self.stage, type_), Stage.DIRTY)
        return may_be_heard

    def _is_unasked(self, type_: str) -> bool:
        if self.stage is Stage.EMPTY and type_ == "audio.delta":
            return self.was_cleared and not self.is_unambiguous
        return self.is_clean


def type_of(frame: object) -> str:
    """The type of a text frame; `UNREADABLE` if there is none."""
    if isinstance(frame, str) and (delta := _DELTA.match(frame)):
        return delta[1]
    type_ = _parsed(frame).get("type")
    return type_ if isinstance(type_, str) else UNREADABLE


def _parsed(frame: object) -> dict[str, Any]:
    """The JSON object in a frame; empty if there is none."""
    if not isinstance(frame, str):
        return {}
    try:
        message = json.loads(frame)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}
