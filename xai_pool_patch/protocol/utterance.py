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
    """The acknowledgement of a `text.clear`. Anything of the utterance may come before it."""
    DIRTY = "dirty"
    """Unknown. Such a connection never serves another utterance."""


UNHEARD = (Stage.ASKED, Stage.AWAITING, Stage.EMPTY)
"""None of the audio has come."""
SPEAKING = (Stage.SPEAKING, Stage.FINISHING)
"""Audio has come, and more of it changes nothing."""

# A frame that is not listed for a stage makes the connection dirty. So does every frame that is
# sent before a clear is acknowledged: there is never more than one clear at a time.
_AFTER_SENDING = {
    (Stage.CLEAN, "text.delta"): Stage.ASKED,
    (Stage.CLEAN, "text.done"): Stage.EMPTY,
    (Stage.ASKED, "text.delta"): Stage.ASKED,
    (Stage.ASKED, "text.done"): Stage.AWAITING,
    (Stage.SPEAKING, "text.delta"): Stage.SPEAKING,
    (Stage.SPEAKING, "text.done"): Stage.FINISHING,
    **{(stage, "text.clear"): Stage.CLEARING for stage in (*UNHEARD, *SPEAKING)},
    **{(stage, "session.update"): stage for stage in Stage},
}
_AFTER_RECEIVING = {
    (Stage.ASKED, "audio.delta"): Stage.SPEAKING,
    (Stage.SPEAKING, "audio.delta"): Stage.SPEAKING,
    (Stage.AWAITING, "audio.delta"): Stage.FINISHING,
    (Stage.FINISHING, "audio.delta"): Stage.FINISHING,
    (Stage.AWAITING, "audio.done"): Stage.CLEAN,
    (Stage.FINISHING, "audio.done"): Stage.CLEAN,
    (Stage.EMPTY, "audio.delta"): Stage.FINISHING,
    (Stage.EMPTY, "audio.done"): Stage.CLEAN,
    (Stage.CLEARING, "audio.delta"): Stage.CLEARING,
    (Stage.CLEARING, "audio.done"): Stage.CLEARING,
    (Stage.CLEARING, "audio.clear"): Stage.CLEAN,
}

_DELTA = re.compile(r'\{\s*"type"\s*:\s*"((?:audio|text)\.delta)"\s*,')
"""Detects the most frequent frames without parsing them. If the rest of one is malformed, the
plugin reports that when it parses it, and the pool discards the connection all the same."""

UNREADABLE = "unreadable"
"""The type of a frame that is not a JSON object with a type."""


class UtteranceTracker:
    """Follows one connection from utterance to utterance.

    Attributes:
        is_unused: no utterance has begun on this connection.
        is_first: no utterance came before this one, so everything answers this one.
        was_cleared: a `text.clear` interrupted an utterance on this connection. Only the server's
            acknowledgement says that nothing more comes of it.
        was_configured: a `session.update` changed how this connection speaks.
    """

    def __init__(self) -> None:
        self.stage = Stage.CLEAN
        self.is_unused = True
        self.is_first = False
        self.was_cleared = False
        self.was_configured = False

    def __repr__(self) -> str:
        return f"<UtteranceTracker {self.stage.value}>"

    def sent(self, frame: object) -> str:
        """Follow a frame to the server, and return its type.

        Call this before the send: a send that is cancelled may have left all the same.
        """
        type_ = type_of(frame)
        self.was_configured |= type_ == "session.update"
        if self.stage is Stage.CLEAN and type_ != "session.update":
            self.is_first, self.is_unused = self.is_unused, False
        self.stage = _AFTER_SENDING.get((self.stage, type_), Stage.DIRTY)
        self.was_cleared |= self.stage is Stage.CLEARING
        return type_

    def received(self, type_: str) -> bool:
        """Follow a frame from the server. False for audio that no text asked for."""
        is_answer = type_.startswith("audio.")
        is_asked_for = not (is_answer and self.stage is Stage.CLEAN)
        if is_answer or type_ in ("error", UNREADABLE):
            self.stage = _AFTER_RECEIVING.get((self.stage, type_), Stage.DIRTY)
        return is_asked_for


def type_of(frame: object) -> str:
    """The type of a text frame; `UNREADABLE` if there is none."""
    if isinstance(frame, str) and (delta := _DELTA.match(frame)):
        return delta[1]
    type_ = parsed(frame).get("type")
    return type_ if isinstance(type_, str) else UNREADABLE


def parsed(frame: object) -> dict[str, Any]:
    """The JSON object in a frame; empty if there is none."""
    if not isinstance(frame, str):
        return {}
    try:
        message = json.loads(frame)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}
