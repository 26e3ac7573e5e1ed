"""Where a connection stands in xAI's protocol. Pure: frames in, a stage out.

xAI's audio carries no utterance id. The only proofs that nothing more will come for an utterance
are its `audio.done`, received after its `text.done` was sent, and the `audio.clear` that answers a
`text.clear`.
"""

from __future__ import annotations

import enum
import json
import re
from typing import Any


class Stage(enum.Enum):
    """What the server still owes this connection."""

    CLEAN = "clean"
    """Nothing: all that was asked for has been answered in full."""
    ASKED = "asked"
    """Audio for the text sent so far, of which none has come; more text may follow."""
    SPEAKING = "speaking"
    """More of the audio that has begun to come; more text may follow."""
    AWAITING = "awaiting"
    """All of the audio and its `audio.done`."""
    FINISHING = "finishing"
    """The rest of the audio and its `audio.done`."""
    EMPTY = "empty"
    """An `audio.done` for an utterance without text."""
    CLEARING = "clearing"
    """The acknowledgement of a `text.clear`. Until it comes, so may what was under way."""
    PROVING = "proving"
    """The acknowledgement of a `text.clear` and nothing else: no utterance is under way."""
    DIRTY = "dirty"
    """Nobody can tell any more. Such a connection never serves another utterance."""


# What is not listed here is not part of one utterance after another: it spoils the connection.
# So does whatever is sent before a clear is acknowledged: there is never more than one of those.
_AFTER_SENDING = {
    (Stage.CLEAN, "text.delta"): Stage.ASKED,
    (Stage.CLEAN, "text.done"): Stage.EMPTY,
    (Stage.ASKED, "text.delta"): Stage.ASKED,
    (Stage.ASKED, "text.done"): Stage.AWAITING,
    (Stage.SPEAKING, "text.delta"): Stage.SPEAKING,
    (Stage.SPEAKING, "text.done"): Stage.FINISHING,
    (Stage.CLEAN, "text.clear"): Stage.PROVING,
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
    (Stage.CLEARING, "audio.done"): Stage.PROVING,
    (Stage.CLEARING, "audio.clear"): Stage.CLEAN,
    (Stage.PROVING, "audio.clear"): Stage.CLEAN,
}

_AUDIO_DELTA = re.compile(r'\{\s*"type"\s*:\s*"audio\.delta"\s*,')
"""Spares the most frequent and longest frame a second parsing. If it is malformed further on, the
plugin's parsing raises, and the connection is discarded all the same."""

UNREADABLE = "unreadable"
"""The type of a frame that is not a JSON object with a type."""


class UtteranceTracker:
    """Follows one connection from utterance to utterance.

    Attributes:
        was_cleared: an utterance was cut off by `text.clear`. That nothing of it comes any more
            is from then on the server's word.
        has_words: the utterance has something to be spoken. Blanks and punctuation may be answered
            by silence, by `audio.done` alone or by an error: nobody has said which.
        is_told_apart: what comes from here on is known to answer this utterance.
        is_first: no utterance came before this one: what comes can only answer it.
    """

    def __init__(self) -> None:
        self.stage = Stage.CLEAN
        self.was_cleared = False
        self.has_words = False
        self.is_told_apart = False
        self.is_first = False
        self._is_unused = True

    def __repr__(self) -> str:
        return f"<UtteranceTracker {self.stage.value}>"

    @property
    def is_clean(self) -> bool:
        return self.stage is Stage.CLEAN

    @property
    def awaits_clear(self) -> bool:
        return self.stage in (Stage.CLEARING, Stage.PROVING)

    @property
    def _may_stay_silent(self) -> bool:
        """Whether `audio.done` without audio would be this utterance's.

        Else it is taken for another's: a text with words is answered by a voice.
        """
        return self.stage is Stage.AWAITING and (self.is_told_apart or not self.has_words)

    def sent(self, frame: object) -> None:
        """Must be called before the frame leaves: a send that is cancelled may have left."""
        message = _parsed(frame)
        type_ = _type_in(message)
        if self.is_clean:
            self.has_words = self.is_told_apart = False
            self.is_first, self._is_unused = self._is_unused, False
        if type_ == "text.delta":
            self.has_words |= any(map(str.isalnum, str(message.get("delta"))))
        self.stage = _AFTER_SENDING.get((self.stage, type_), Stage.DIRTY)
        self.was_cleared |= self.stage is Stage.CLEARING

    def received(self, type_: str) -> bool:
        """Whether a frame of this type may be heard: audio that nobody asked for must not."""
        is_answer = type_.startswith("audio.")
        may_be_heard = not (is_answer and self._is_unasked(type_))
        if type_ == "audio.done" and self._may_stay_silent:
            self.stage = Stage.CLEAN
        elif is_answer or type_ in ("error", UNREADABLE):
            self.stage = _AFTER_RECEIVING.get((self.stage, type_), Stage.DIRTY)
        return may_be_heard

    def _is_unasked(self, type_: str) -> bool:
        if self.stage is Stage.EMPTY and type_ == "audio.delta":
            return self.was_cleared and not self.is_told_apart
        return self.is_clean


def type_of(frame: object) -> str:
    """The type of a text frame, `UNREADABLE` if it has none."""
    if isinstance(frame, str) and _AUDIO_DELTA.match(frame):
        return "audio.delta"
    return _type_in(_parsed(frame))


def _parsed(frame: object) -> dict[str, Any]:
    """Empty if it is not a JSON object."""
    if not isinstance(frame, str):
        return {}
    try:
        message = json.loads(frame)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _type_in(message: dict[str, Any]) -> str:
    type_ = message.get("type")
    return type_ if isinstance(type_, str) else UNREADABLE
