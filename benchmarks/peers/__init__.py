"""Other clients of xAI's TTS beside the patched plugin, in the same conversations.

`make bench-peers` runs it. Each client runs in an environment of its own, as a command that reads a
`Task` on stdin and prints what was heard. The fake servers are in the process that compares.

- `conversation`: the task, and how it is carried out; imports nothing that has to be installed
- `plugin`, `pipecat_service`: the clients
- `command`: the comparison
"""
