"""Everything that knows LiveKit's xAI plugin: which releases there are, and how each is patched.

`releases` detects the installed release, `patching` replaces and restores attributes, `wrappers`
and `native_pool` are the replacements, `provider` connects these to the pools. `asking` asks a TTS
what it would connect to. `signs` hears when an AgentSession is about to reply, `conversation` is
what is known about it.

The modules import `registry`, `manager` and what is below them. Enter a new release of the plugin
in `releases`. Only a release of a new shape needs more than that.
"""
