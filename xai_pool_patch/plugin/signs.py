"""Signs that an AgentSession is about to reply, in time to dial before there is any text.

A session says by its events what it does. `speech_created` comes before the LLM is asked, also for
a preemptive reply; the first text, which asks for a connection, only after the LLM's first token.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

from livekit.agents.llm import RealtimeModel
from livekit.agents.utils import is_given

from ..registry import running_loop
from .conversation import Conversation, enter_conversation
from .provider import ConnectionProvider


class Signs:
    """Hears what AgentSessions emit, and has a connection ready for the replies that follow.

    Args:
        provider: keeps the connection, where it knows the TTS.
    """

    def __init__(self, provider: ConnectionProvider) -> None:
        self._provider = provider
        self._conversations = weakref.WeakKeyDictionary[Any, Conversation]()

    def start(self, wrapped: Any, session: Any, args: Any, kwargs: Any) -> Any:
        """Wraps `AgentSession.start`, which prewarms before it emits anything."""
        self._provider.registry.attempt("a start", self._enter, session)
        return wrapped(*args, **kwargs)

    def emitted(self, session: Any, _: None, event: str, arg: Any) -> None:
        """Runs after `AgentSession.emit`: the session's own listeners may interrupt a reply."""
        if event not in (*_SIGNS, "close") or running_loop() is None:
            return
        conversation = self._enter(session)
        if event == "close":
            self._provider.leave(self._provider.registry.here(), conversation)
        elif _is_heard(session) and _SIGNS[event](self, session, conversation, arg):
            expect = functools.partial(self._provider.expect, conversation)
            # Before its first word, the session's own TTS is the best guess. Inside an adapter
            # there may be several: which of them speaks is known once one has.
            if not expect(conversation.tts):
                expect(_model(session, "tts"))

    def _enter(self, session: Any) -> Conversation:
        conversation = self._conversations.setdefault(session, Conversation(session))
        # Left set: the framework creates the task that will speak after this event, and that task
        # inherits the context. So the session is known where the plugin asks for a connection.
        enter_conversation(conversation)
        return conversation

    # Each says whether a reply is to come that needs a connection.

    def _speech_created(self, session: Any, conversation: Conversation, event: Any) -> bool:
        if event.source == "generate_reply" and _speaks_itself(session):
            return False
        conversation.begin_reply(event.speech_handle)
        attempt = functools.partial(self._provider.registry.attempt, "the end of a reply")
        event.speech_handle.add_done_callback(functools.partial(attempt, self._ended, conversation))
        return conversation.replies_to_come > 0

    def _tools_executed(self, session: Any, conversation: Conversation, event: Any) -> bool:
        return event.has_tool_reply and conversation.replies_to_come > 0

    def _agent_state_changed(self, session: Any, conversation: Conversation, event: Any) -> bool:
        # Only prolongs: it comes too when a tool begins that may take any time.
        is_prolonged = event.new_state == "thinking" and conversation.is_expected
        return is_prolonged and conversation.replies_to_come > 0

    def _user_state_changed(self, session: Any, conversation: Conversation, event: Any) -> bool:
        # A realtime model creates its speech with its first output, which is too late.
        is_realtime = isinstance(_model(session, "llm"), RealtimeModel)
        return event.new_state == "listening" and is_realtime and not _speaks_itself(session)

    def _ended(self, conversation: Conversation, handle: Any) -> None:
        if not conversation.replies_to_come:
            conversation.withdraw()


_SIGNS = {
    "speech_created": Signs._speech_created,
    "function_tools_executed": Signs._tools_executed,
    "agent_state_changed": Signs._agent_state_changed,
    "user_state_changed": Signs._user_state_changed,
}


def _is_heard(session: Any) -> bool:
    """Whether the session has its replies spoken at all; it may only write."""
    return session.output.audio is not None and session.output.audio_enabled


def _speaks_itself(session: Any) -> bool:
    """Whether the replies of the session's model need no TTS."""
    model = _model(session, "llm")
    return isinstance(model, RealtimeModel) and model.capabilities.audio_output


def _model(session: Any, name: str) -> Any:
    """The `llm` or `tts` of the session's agent, else the session's own."""
    try:
        own = getattr(session.current_agent, name)
    except RuntimeError:  # no agent is active
        return None
    return own if is_given(own) else getattr(session, name)
