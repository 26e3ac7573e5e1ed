"""S2: which pool expects the next reply of a conversation."""

from __future__ import annotations

from typing import Any

from xai_pool_patch.plugin.conversation import Conversation


class Expecting:
    """A pool, as far as it can expect somebody."""

    def __init__(self) -> None:
        self.expected: set[object] = set()

    def expect(self, caller: object, until: float) -> None:
        self.expected.add(caller)

    def withdraw(self, caller: object) -> None:
        self.expected.discard(caller)

    def acquired_by(self, caller: object) -> Any:
        self.expected.discard(caller)
        return self


class Session:
    """An AgentSession, of which only the identity matters."""


class Handle:
    """A reply that is neither done nor interrupted."""

    interrupted = False

    def done(self) -> bool:
        return False


async def test_only_the_pool_of_the_last_sign_expects() -> None:
    """The TTS may have changed its options, or another agent may have taken over."""
    conversation, first, second = Conversation(Session()), Expecting(), Expecting()
    conversation.expect_at(first)  # type: ignore[arg-type]
    conversation.expect_at(second)  # type: ignore[arg-type]
    assert (first.expected, second.expected) == (set(), {conversation})


async def test_a_pool_that_did_not_serve_the_reply_does_not_expect_it() -> None:
    """Another TTS spoke, such as the second of a FallbackAdapter."""
    conversation, first, second = Conversation(Session()), Expecting(), Expecting()
    conversation.expect_at(first)  # type: ignore[arg-type]
    conversation.speaks(Expecting(), second.acquired_by(conversation))
    assert (first.expected, conversation.is_expected) == (set(), False)


async def test_a_reply_that_speaks_is_not_expected_again() -> None:
    """Unless another waits for its turn."""
    conversation, pool, handles = Conversation(Session()), Expecting(), [Handle(), Handle()]
    for handle, expected in zip(handles, (set(), {conversation}), strict=True):
        conversation.begin_reply(handle)
        conversation.expect_at(pool)  # type: ignore[arg-type]
        conversation.speaks(Expecting(), pool.acquired_by(conversation))
        assert pool.expected == expected
