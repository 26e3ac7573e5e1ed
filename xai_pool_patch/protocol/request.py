"""What a TTS asks aiohttp for when it connects: the key of a pool, and what the pool dials."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import yarl


@dataclass(eq=False)
class Request:
    """A call of `ClientSession.ws_connect`. Two that are equal open interchangeable connections.

    The repr shows nothing of it: the headers have the API key, and a voice may be a customer's own.

    Attributes:
        host: the URL's host and port.

    Raises:
        TypeError, ValueError, IndexError: the arguments cannot be compared, or have no URL.
    """

    session: aiohttp.ClientSession
    """Compared by identity."""
    args: tuple[Any, ...]
    """The positional arguments; the first is the URL."""
    kwargs: Mapping[str, Any]
    max_age: float
    """Seconds after which the application wants no connection to be used any more."""
    owner: object = None
    """What the connections belong to, if they are not shared; compared by identity."""

    def __post_init__(self) -> None:
        url = yarl.URL(self.args[0])
        self.host = f"{url.host}:{url.port}"
        asked = (_frozen(self.args), _frozen(self.kwargs))
        self._identity = (id(self.session), *asked, self.max_age, id(self.owner))
        self._hash = hash(self._identity)
        self.kwargs = {**self.kwargs, "autoping": False}

    def __repr__(self) -> str:
        return "<Request>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Request) and self._identity == other._identity

    def __hash__(self) -> int:
        return self._hash

    async def connect(self, timeout: float) -> aiohttp.ClientWebSocketResponse | Exception:
        """Open the WebSocket. PINGs and PONGs reach its reader.

        Returns:
            The WebSocket, or what aiohttp or a hook of the application has raised. What this raises
            is a fault of the package.
        """
        try:
            opening = self.session.ws_connect(*self.args, **self.kwargs)
            return await asyncio.wait_for(opening, timeout)
        except Exception as error:
            return error


def _frozen(value: Any) -> Hashable:
    """The value, so that it can be compared later though the application may change it."""
    if isinstance(value, Mapping):
        return tuple((key, _frozen(each)) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    return value  # type: ignore[no-any-return]
