"""One WebSocket that speaks xAI's text-to-speech protocol, and one utterance on it.

`connection` reads a socket for its whole life, `utterance` knows the protocol's frames, `exchange`
carries one utterance and replays it if need be, `lease` is what the plugin sees as its WebSocket.

The modules import `pool`, `telemetry` and the root leaves, and nothing above them. A change of
xAI's protocol belongs in the two tables of `utterance`.
"""
