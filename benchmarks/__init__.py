"""The benchmark: how long the plugin takes to its first audio as it is and patched, side by side.

`make bench` runs it. It is a tool of this repository, is not in the wheel, and may change freely:
nothing else imports it but its own test.

- `cases`: conversations with the real plugin against the fake server
- `calls`, `fleet`: real AgentSessions, and many of them that share the sessions of one team
- `simulation`: thousands of calls in virtual time, with the real pools
- `costs`: what the pool itself takes in CPU time
- `helpers`, `servers`, `runs`: the processes, the way between them, and one run over all of it
- `peers`: other clients of xAI's TTS in the same conversations
- `goals`: what each figure should be, and by how much it is not
- `report`, `fleet_command`: tables and JSON
"""
