"""A forked process that uses a store of the parent's."""

from __future__ import annotations

import asyncio
import os
import threading

from xai_pool_patch.sessions import Store


def fork_that_reads(store: Store, host: str) -> int:
    """The number of the child. Its exit code is 0 if it has read an end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # The parent's loop is here in mid-run: only another thread can have one.
            found: list[float | None] = []
            thread = threading.Thread(target=lambda: found.append(asyncio.run(store.read(host))))
            thread.start()
            thread.join(30.0)
            status = 0 if found and found[0] is not None else 2
        finally:
            os._exit(status)
    return child
