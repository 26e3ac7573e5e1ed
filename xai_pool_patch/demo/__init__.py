"""What `xai-pool-patch demo` does: one conversation, held with the plugin as it is and patched.

- `conversation`: the agent, its loudspeaker, and what they measure
- `report`: tables, bars, a picture and JSON
- `arguments`: which values the options take

A user runs the command and imports nothing from here. All of it may change; the benchmark and the
tests of this repository are its only other users. The server is the one of
`xai_pool_patch.testing`.
"""
