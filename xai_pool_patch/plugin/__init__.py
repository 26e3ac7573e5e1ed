"""All that knows LiveKit's xAI plugin: which releases there are, and how each one is patched.

`releases` tells the supported releases apart, `patching` replaces and restores attributes,
`wrappers` and `native_pool` are what replaces them, `provider` and `connector` connect what they
do to the pools.

The modules import `manager` and the packages below it. A new release of the plugin is entered in
`releases`; only a release of a new shape needs more than that.
"""
