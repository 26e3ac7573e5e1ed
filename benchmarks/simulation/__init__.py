"""A simulation: hundreds of calls, a process each, that share the sessions of one team.

It runs the package's own `PoolManager`, pools, connections, shortages and `Conversation` in virtual
time. Only the ends are plain objects: the server, the WebSockets, the stores by which processes
hear of refusals, and what LiveKit does with a reply (its retries, and when it emits which event).

- `server`: the sessions of the team, and WebSockets that only exist or not
- `agents`: how one call gets its connections, unpatched and patched
- `calls`: what is said in a call and when, and what the caller hears
- `scenario`: many calls at once, and the figures
- `command`, `picture`: the command `python -m benchmarks sessions`
"""
