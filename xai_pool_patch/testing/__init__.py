"""For the tests of your own agent: a fake xAI server, and a slow network in front of it.

No key is needed, and nothing leaves the machine. The plugin may be patched or as it is:

    from livekit.plugins import xai
    from xai_pool_patch.testing import FakeServer

    async with FakeServer(round_trip=0.15) as server, server.client_session() as http:
        tts = xai.TTS(api_key=server.behaviour.api_key, http_session=http)
        ...  # let your agent speak
        assert server.utterance_for("Hello").finished
        await tts.aclose()

What can be asked of it:

- `server.behaviour`, a `Behaviour`, says how the server behaves: how fast it speaks, what it
  refuses, how it ends a connection. Change a field at any time.
- `server.network`, a `SlowNetwork`, is how far away the server is and how the network fails: it
  refuses, stalls, freezes and resets connections, all of them or one (`connection.route`).
- `server.behaviour.max_sessions` is the team's limit, `server.behaviour.refusal` how a client hears
  of it, and `server.session_count` what counts against it.
- `server.handshakes`, `server.connections` and `server.utterances` are what has happened so far.
  `await server.wait_for(...)` waits until something has.
- `await pool_is_ready()`, if the plugin is patched, waits until the next turn needs no dial: after
  `tts.prewarm()`, `AgentSession.start()` or a turn.
- `with isolated():` keeps what the server refuses from other processes, and theirs from the test.
  The pytest fixture does so by itself.

Every sample of an utterance's audio has the value `utterance.number`. Audio of one utterance in
the turn of another is seen by its samples.

All names of `__all__` are public, as is the pytest fixture in `xai_pool_patch.testing.fixtures`.
The modules beside it are not. The extra `testing` installs what is needed:
`pip install "xai_pool_patch[testing]"`. `examples/test_my_agent.py` in the repository is a whole
test. The tests of this package use the same server.
"""

from .network import Route, SlowNetwork
from .patch import isolated, pool_is_ready
from .server import (
    SAMPLE_RATE,
    Behaviour,
    Clearing,
    End,
    Ending,
    FakeServer,
    Handshake,
    Outcome,
    Refusal,
    ServedConnection,
    Utterance,
    Wordless,
)

__all__ = [
    "SAMPLE_RATE",
    "Behaviour",
    "Clearing",
    "End",
    "Ending",
    "FakeServer",
    "Handshake",
    "Outcome",
    "Refusal",
    "Route",
    "ServedConnection",
    "SlowNetwork",
    "Utterance",
    "Wordless",
    "isolated",
    "pool_is_ready",
]
