"""Fake servers in one process, and the way to them from another."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import socket
import ssl
import threading
from dataclasses import dataclass, replace

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from xai_pool_patch.testing import Behaviour, FakeServer
from xai_pool_patch.testing.network import HOST
from xai_pool_patch.testing.server import PATH, SERVER_NAME

URL = f"wss://{SERVER_NAME}{PATH}"


@dataclass(frozen=True)
class Address:
    """How to get to some servers in another process."""

    ports: tuple[int, ...]
    authorities: bytes
    """The certificates to trust, DER."""


_opened: dict[int, FakeServer] = {}
"""Those of this process, by their ports."""


def open_servers(count: int, *, messages_per_second: float = 50.0) -> Address:
    """Starts some without any delay. They stay until the process ends."""
    behaviour = Behaviour(generation=0.0)
    behaviour.pace = messages_per_second * behaviour.chunk
    return _start([FakeServer(behaviour=behaviour) for _ in range(count)])


def open_distant_servers(
    count: int, round_trip: float, behaviour: Behaviour | None = None
) -> list[Address]:
    """Starts some as far away as xAI's, which take as long to generate."""
    address = _start(
        [
            FakeServer(round_trip=round_trip, behaviour=behaviour and replace(behaviour))
            for _ in range(count)
        ]
    )
    return [Address((port,), address.authorities) for port in address.ports]


def connections_at(addresses: list[Address]) -> tuple[int, int]:
    """How many these servers of this process got, and how many were open to one of them at most."""
    servers = [_opened[port] for address in addresses for port in address.ports]
    made = sum(len(server.connections) for server in servers)
    return made, max(server.peak_open for server in servers)


def _start(servers: list[FakeServer]) -> Address:
    """Serves in a thread from now on."""
    opened: queue.Queue[Address] = queue.Queue()
    threading.Thread(target=asyncio.run, args=(_serve(servers, opened),), daemon=True).start()
    address = opened.get()
    _opened.update(zip(address.ports, servers, strict=True))
    return address


async def _serve(servers: list[FakeServer], opened: queue.Queue[Address]) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(server)
        opened.put(address_of(*servers))
        await asyncio.Event().wait()


def address_of(*servers: FakeServer) -> Address:
    """How another process gets to servers of this one."""
    authorities = b"".join(servers[0].ssl_context.get_ca_certs(binary_form=True))
    return Address(tuple(server.network.port for server in servers), authorities)


class _InTurn(AbstractResolver):
    """Sends one connection after another to one server after another."""

    def __init__(self, address: Address) -> None:
        self._ports = itertools.cycle(address.ports)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=HOST,
                port=next(self._ports),
                family=socket.AF_INET,
                proto=0,
                flags=0,
            )
        ]

    async def close(self) -> None:
        """Holds nothing."""


def connect(
    http: aiohttp.ClientSession,
) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientWebSocketResponse]:
    """A WebSocket without the plugin."""
    return http.ws_connect(URL, headers={"Authorization": f"Bearer {Behaviour().api_key}"})


def client_session(address: Address) -> aiohttp.ClientSession:
    """An HTTP session for which every host name leads there; the caller closes it."""
    connector = aiohttp.TCPConnector(
        resolver=_InTurn(address),
        use_dns_cache=False,
        limit=0,
        ssl=ssl.create_default_context(cadata=address.authorities),
    )
    return aiohttp.ClientSession(connector=connector)
