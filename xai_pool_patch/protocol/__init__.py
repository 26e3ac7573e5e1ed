"""One WebSocket that speaks xAI's text-to-speech protocol, and one utterance on it.

`connection` reads a socket for its whole life, `utterance` knows the protocol's frames, `exchange`
carries one utterance and replays it if need be, `lease` is what the plugin sees as its WebSocket.

The modules import `sessions`, `pool`, `telemetry` and the modules at the root below them. If xAI
changes the protocol, change the two tables of `utterance`.
"""
