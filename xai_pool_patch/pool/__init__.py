"""The policy of one pool: who gets which connection, what to dial, what to close, and when.

`pool` decides; `entries` holds what it decides about; `clearing`, `backoff`, `soft_timeout` and
`round_trips` each hold one rule. `supervisor` owns the tasks and timers.

Nothing here imports aiohttp or LiveKit. Of this package it imports only `telemetry`, `options` and
`errors`; `tests/unit/test_layers.py` checks both. A rule may be changed here without knowing xAI's
protocol: the pool sees a connection only as `entries.Poolable`.
"""
