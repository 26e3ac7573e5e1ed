"""The command `xai-pool-patch demo`: one conversation, held with the plugin as it is and patched.

- `conversation`: the agent, its loudspeaker, and what they measure
- `report`: tables, bars, a picture and JSON
- `arguments`: which values the options take

Users run the command and import nothing from here, so everything here may change. The benchmark and
the tests of this repository are the only other users. The fake server is that of
`xai_pool_patch.testing`.
"""
