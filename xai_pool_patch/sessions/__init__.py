"""Whether the sessions of an API key are scarce, and who hears of it.

A dial that is refused for the limit marks the API key for some minutes. `limit` is the rule: how
long a mark lasts, and what a process knows. `mark` says what a mark is and what a place needs that
keeps one for others to see. `machine` and `redis` are two such places.

The modules import only `telemetry` and the root leaves. Everything fails open: without a place that
works, a process sees only its own mark. None of this is on the path of a turn.
"""
