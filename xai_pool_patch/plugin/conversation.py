"""What is known about one AgentSession: which TTS speaks for it, and which replies are to come."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ..pool.pool import Pool
from ..protocol.connection import Connection

SIGN_LASTS = 10.0
"""Seconds after the last sign of a reply in which its first text is expected. An LLM that takes
longer is rare, and until then the connection is reserved."""

_open: weakref.WeakSet[Conversation] = weakref.WeakSet()


class Conversation:
    """One AgentSession, as a caller of the pools.

    Keeps neither the session nor the TTS alive: contexts and pools hold it, and may outlive both.

    Attributes:
        uses: the TTS instances that have spoken in it, or were prewarmed for it.
    """

    def __init__(self, session: Any) -> None:
        self._session = weakref.ref(session)
        self._tts: Callable[[], Any] = lambda: None
        self.uses: weakref.WeakSet[Any] = weakref.WeakSet()
        self._replies: weakref.WeakSet[Any] = weakref.WeakSet()
        self._expected_by: Pool[Connection] | None = None
        self._expected_until = 0.0

    @property
    def tts(self) -> Any:
        """The TTS that is most likely to speak next; None if none has spoken yet, or it is gone."""
        return self._tts()

    @tts.setter
    def tts(self, tts: Any) -> None:
        self._tts = weakref.ref(tts)
        self.uses.add(tts)
        _open.add(self)

    @property
    def is_closing(self) -> bool:
        """The session is being closed, and interrupts its agent for that."""
        session = self._session()
        return bool(getattr(session, "_closing", False) or getattr(session, "_closing_task", None))

    @property
    def replies_to_come(self) -> int:
        """Replies that have begun, and are neither done nor interrupted."""
        return sum(not (handle.done() or handle.interrupted) for handle in self._replies)

    @property
    def is_expected(self) -> bool:
        """Whether a pool keeps a connection for the next reply."""
        now = asyncio.get_running_loop().time()
        return self._expected_by is not None and now < self._expected_until

    def begin_reply(self, handle: Any) -> None:
        self._replies.add(handle)

    def expect_at(self, pool: Pool[Connection]) -> None:
        """After a sign of a reply: that pool keeps a connection for it, and no other does."""
        if self._expected_by is not pool:
            self.withdraw()
        self._expected_by = pool
        self._expected_until = asyncio.get_running_loop().time() + SIGN_LASTS
        pool.expect(self, self._expected_until)

    def withdraw(self) -> None:
        """No reply is to come that needs a connection."""
        pool, self._expected_by = self._expected_by, None
        if pool is not None:
            pool.withdraw(self)

    def speaks(self, tts: Any, pool: Pool[Connection]) -> None:
        """A reply has got its connection from that pool, which expects it no more."""
        self.tts = tts
        if self._expected_by is pool and self.is_expected and self.replies_to_come > 1:
            pool.expect(self, self._expected_until)  # one that is queued speaks next
        else:
            self.withdraw()  # of another pool too, and of a sign that came while it waited

    def close(self) -> list[Any]:
        """The session is over. Returns the TTS instances that no other session uses."""
        self.withdraw()
        _open.discard(self)
        others = list(_open)
        return [tts for tts in self.uses if not any(tts in other.uses for other in others)]


_current: ContextVar[Conversation | None] = ContextVar("xai_pool_patch.conversation", default=None)
current_conversation = _current.get
enter_conversation = _current.set
