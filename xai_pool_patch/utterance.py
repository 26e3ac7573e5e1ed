"""Where a connection stands in xAI's protocol. Pure: frames in, a stage out.

xAI's audio carries no utterance id. The only proof that nothing more will come for an utterance
is its `audio.done`, received after its `text.done` was sent.
"""

from __future__ import annotations

import enum
import json


class Stage(enum.Enum):
    """What the server still owes this connection."""

    CLEAN = "clean"
    """Nothing: all that was asked for has been answered in full."""
    SPEAKING = "speaking"
    """Audio for the text sent so far; more text may follow."""
    FINISHING = "finishing"
    """The rest of the audio and its `audio.done`."""
    SPOILED = "spoiled"
    """Nobody can tell any more. Such a connection never serves another utterance."""


# What is not listed here is not part of one utterance after another: it spoils the connection.
_AFTER_SENDING = {
    (Stage.CLEAN, "text.delta"): Stage.SPEAKING,
    (Stage.CLEAN, "text.done"): Stage.FINISHING,
    (Stage.SPEAKING, "text.delta"): Stage.SPEAKING,
    (Stage.SPEAKING, "text.done"): Stage.FINISHING,
}
_AFTER_RECEIVING = {
    (Stage.SPEAKING, "audio.delta"): Stage.SPEAKING,
    (Stage.FINISHING, "audio.delta"): Stage.FINISHING,
    (Stage.FINISHING, "audio.done"): Stage.CLEAN,
}

_UNREADABLE = "unreadable"


class UtteranceTracker:
    """Follows one connection from utterance to utterance."""

    def __init__(self) -> None:
        self.stage = Stage.CLEAN

    def __repr__(self) -> str:
        return f"<UtteranceTracker {self.stage.value}>"

    @property
    def is_clean(self) -> bool:
        return self.stage is Stage.CLEAN

    def sent(self, frame: object) -> None:
        """To be told before the frame leaves: a send that is cancelled may have left."""
        self.stage = _AFTER_SENDING.get((self.stage, _type_of(frame)), Stage.SPOILED)

    def received(self, frame: object) -> bool:
        """Whether the frame may be heard: audio that nobody asked for must not."""
        type_ = _type_of(frame)
        is_answer = type_.startswith("audio.")
        is_stale = is_answer and self.is_clean
        if is_answer or type_ in ("error", _UNREADABLE):
            self.stage = _AFTER_RECEIVING.get((self.stage, type_), Stage.SPOILED)
        return not is_stale


def _type_of(frame: object) -> str:
    if not isinstance(frame, str):
        return _UNREADABLE
    try:
        message = json.loads(frame)
    except (ValueError, RecursionError):
        return _UNREADABLE
    type_ = message.get("type") if isinstance(message, dict) else None
    return type_ if isinstance(type_, str) else _UNREADABLE
