"""LiveKit's plugin as a client: as it is, or patched with the options that are its argument.

`python -m benchmarks.peers.plugin [JSON]`
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
import sys
from collections.abc import AsyncIterator, Callable

from livekit.plugins import xai

import xai_pool_patch
from xai_pool_patch.options import PoolOptions

from ..cases import ONCE
from ..servers import Address, client_session
from .conversation import Client, Task, main


class Plugin:
    """Speaks through the plugin."""

    def __init__(self, tts: xai.TTS) -> None:
        self._tts = tts
        self._speech: asyncio.Task[None] | None = None

    async def use_voice(self, voice: str) -> None:
        self._tts.update_options(voice=voice)

    async def speak(self, text: str, hear: Callable[[bytes], None]) -> None:
        self._speech = asyncio.create_task(self._speak(text, hear))

    async def _speak(self, text: str, hear: Callable[[bytes], None]) -> None:
        async with self._tts.stream(conn_options=ONCE) as stream:
            stream.push_text(text)
            stream.end_input()
            async for event in stream:
                hear(bytes(event.frame.data))

    async def finish(self) -> None:
        assert self._speech is not None
        await self._speech

    async def interrupt(self) -> None:
        assert self._speech is not None
        self._speech.cancel()
        await asyncio.wait([self._speech])


@contextlib.asynccontextmanager
async def _open(task: Task) -> AsyncIterator[Client]:
    trusted = ssl.create_default_context().get_ca_certs(binary_form=True)
    async with client_session(Address((task.port,), b"".join(trusted))) as http:
        tts = xai.TTS(api_key=task.api_key, http_session=http)
        tts.prewarm()
        yield Plugin(tts)
        await tts.aclose()


if __name__ == "__main__":
    logging.disable()  # a turn that fails is part of the result
    if sys.argv[1:]:
        xai_pool_patch.install(PoolOptions(**json.loads(sys.argv[1])))
    main(_open)
