"""Where a connection stands in xAI's protocol. Pure: frames in, a stage out.

xAI's audio carries no utterance id. The only proofs that nothing more will come for an utterance
are its `audio.done`, received after its `text.done` was sent, and the `audio.clear` that answers a
`text.clear`.
"""

from __future__ import annotations

import enum
import json
import re


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
    SPOILED = "spoiled"
    """Nobody can tell any more. Such a connection never serves another utterance."""


# What is not listed here is not part of one utterance after another: it spoils the connection.
# So does an `audio.done` before any audio of an utterance with text, which is not that text's, and
# so does whatever is sent before a clear is acknowledged: there is never more than one of those.
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
    """

    def __init__(self) -> None:
        self.stage = Stage.CLEAN
        self.was_cleared = False

    def __repr__(self) -> str:
        return f"<UtteranceTracker {self.stage.value}>"

    @property
    def is_clean(self) -> bool:
        return self.stage is Stage.CLEAN

    @property
    def awaits_clear(self) -> bool:
        return self.stage in (Stage.CLEARING, Stage.PROVING)

    def sent(self, frame: object) -> None:
        """To be told before the frame leaves: a send that is cancelled may have left."""
        self.stage = _AFTER_SENDING.get((self.stage, type_of(frame)), Stage.SPOILED)
        self.was_cleared |= self.stage is Stage.CLEARING

    def received(self, type_: str) -> bool:
        """Whether a frame of this type may be heard: audio that nobody asked for must not."""
        is_answer = type_.startswith("audio.")
        is_unasked = self.is_clean or (self.stage, type_) == (Stage.EMPTY, "audio.delta")
        if is_answer or type_ in ("error", UNREADABLE):
            self.stage = _AFTER_RECEIVING.get((self.stage, type_), Stage.SPOILED)
        return not (is_answer and is_unasked)


def type_of(frame: object) -> str:
    """The type of a text frame, `UNREADABLE` if it has none."""
    if not isinstance(frame, str):
        return UNREADABLE
    if _AUDIO_DELTA.match(frame):
        return "audio.delta"
    try:
        message = json.loads(frame)
    except (ValueError, RecursionError):
        return UNREADABLE
    type_ = message.get("type") if isinstance(message, dict) else None
    return type_ if isinstance(type_, str) else UNREADABLE
