"""A slow network in front of a local server: distance, and the ways in which networks fail."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import struct
from collections import deque
from collections.abc import Callable

HOST = "127.0.0.1"


class _Signal(enum.Enum):
    """What travels through a lane besides bytes."""

    EOF = "eof"
    RESET = "reset"
    FREEZE = "freeze"


def reset_transport(transport: asyncio.Transport, sock: socket.socket | None) -> None:
    """Closes a TCP connection at once, with RST instead of FIN.

    Args:
        sock: the transport's. A TLS transport that was closed twice does not know it any more, and
            aiohttp does close it twice.
    """
    if sock is not None and sock.fileno() >= 0:  # else closed already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(AttributeError):  # of a closed TLS transport, in Python 3.11.2
        transport.abort()


class _End(asyncio.Protocol):
    """The network's own socket towards one side. What it receives goes into the lane to the other.

    asyncio sets TCP_NODELAY on it.
    """

    transport: asyncio.Transport | None = None

    def __init__(self, on_open: Callable[[], None], hear: Callable[[bytes | _Signal], None]):
        self._on_open = on_open
        self._hear = hear
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._on_open()

    def data_received(self, data: bytes) -> None:
        self._hear(data)

    def eof_received(self) -> bool:
        self._hear(_Signal.EOF)
        return True  # the other direction stays open

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:  # else the network closed it itself
            self._hear(_Signal.RESET)
        self.lost.set_result(None)

    def reset(self) -> None:
        if self.transport is not None:
            reset_transport(self.transport, self.transport.get_extra_info("socket"))


class _Lane:
    """One direction of a route: what goes in comes out half a round trip later, in order."""

    def __init__(self, route: Route, exchange_of: Callable[[bytes | _Signal], None]) -> None:
        self._route = route
        self._deliver = exchange_of
        self._items: deque[tuple[float, bytes | _Signal]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def put(self, item: bytes | _Signal) -> None:
        self._items.append((self._route.arrival_time(), item))
        if len(self._items) == 1:  # else pump() comes back anyway
            self.pump()

    def pump(self) -> None:
        """Delivers all that is due, and comes back for the rest."""
        loop = asyncio.get_running_loop()
        self._stop_timer()
        while self._items and self._route.is_flowing:
            due, item = self._items[0]
            if due > loop.time():
                self._timer = loop.call_at(due, self.pump)
                return
            self._items.popleft()
            self._deliver(item)

    def drop(self) -> None:
        """Forgets what is under way: both sides are gone."""
        self._items.clear()
        self._stop_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class Route:
    """One TCP connection through the network, from the client to the server.

    Attributes:
        client_left: set when the news that the client closed or reset its side has reached
            the server.
    """

    def __init__(self, network: SlowNetwork) -> None:
        self._network = network
        self._dialled_at = asyncio.get_running_loop().time()
        self._frozen = network.stall_new
        self._half_open_at_end = False
        self._reset = False
        self._eofs = 0
        self._up = _Lane(self, self._deliver_up)
        self._down = _Lane(self, self._deliver_down)
        self._client = _End(on_open=self._accepted, hear=self._up.put)
        self._server = _End(on_open=self._reached, hear=self._hear_server)
        self._task: asyncio.Task[None] | None = None
        self.client_left = asyncio.Event()

    def __repr__(self) -> str:
        state = "frozen" if self._frozen else "flowing" if self.is_flowing else "connecting"
        return f"<Route {state}>"

    @property
    def is_flowing(self) -> bool:
        """True when bytes pass: the server is connected, and the route is not frozen."""
        return self._server.transport is not None and not self._frozen

    @property
    def server_port(self) -> int | None:
        """The port from which the server sees this route come."""
        transport = self._server.transport
        return transport.get_extra_info("sockname")[1] if transport is not None else None

    def freeze(self) -> None:
        """Makes the route half-open: nothing passes in either direction, and neither side notices.

        What is on its way stays there, and so does what follows, even the end of a side.
        """
        self._frozen = True

    def unfreeze(self) -> None:
        """Delivers what was held back, as TCP would by retransmission."""
        self._frozen = False
        self._up.pump()
        self._down.pump()

    def half_open_at_end(self) -> None:
        """Freezes the route when the server ends its side, so that the client does not notice."""
        self._half_open_at_end = True

    def reset(self) -> None:
        """Sends RST to both sides now; what is on its way is lost."""
        self._reset = True
        self._client.reset()
        self._server.reset()

    async def wait_closed(self) -> None:
        """Waits until both sides of the route are gone."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def arrival_time(self) -> float:
        """When something that sets off now arrives, in loop time.

        Locally the TCP handshake takes no time. It is charged here: nothing sets off before one
        round trip after the dial.
        """
        round_trip = self._network.round_trip
        now = asyncio.get_running_loop().time()
        return max(now, self._dialled_at + round_trip) + round_trip / 2

    def _accepted(self) -> None:
        if self._network.admit(self):
            self._task = asyncio.get_running_loop().create_task(self._carry())
        else:
            self._client.reset()

    async def _carry(self) -> None:
        """The life of the route: until both sides are lost."""
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: self._server, HOST, self._network.target_port)
        except OSError:
            self._client.reset()  # no server, no client
        else:
            await self._server.lost
        await self._client.lost
        self.client_left.set()
        self._up.drop()
        self._down.drop()
        self._network.forget(self)

    def _reached(self) -> None:
        if self._reset:  # while the server was being dialled
            self._server.reset()
        else:
            self._up.pump()

    def _hear_server(self, item: bytes | _Signal) -> None:
        ends = isinstance(item, _Signal)
        self._down.put(_Signal.FREEZE if ends and self._half_open_at_end else item)

    def _deliver_up(self, item: bytes | _Signal) -> None:
        self._deliver(item, self._server)
        if isinstance(item, _Signal):
            self.client_left.set()

    def _deliver_down(self, item: bytes | _Signal) -> None:
        if item is _Signal.FREEZE:
            self.freeze()
        else:
            self._deliver(item, self._client)

    def _deliver(self, item: bytes | _Signal, end: _End) -> None:
        if end.transport is None or end.transport.is_closing():
            return
        if isinstance(item, bytes):
            end.transport.write(item)
        elif item is _Signal.EOF:
            with contextlib.suppress(OSError):  # reset, and not yet noticed
                end.transport.write_eof()
            self._close_after_both_eofs()
        else:
            end.reset()

    def _close_after_both_eofs(self) -> None:
        self._eofs += 1
        if self._eofs == 2:
            for end in (self._client, self._server):
                if end.transport is not None:
                    end.transport.close()


class SlowNetwork:
    """Forwards TCP connections from a port of its own to a server on this machine.

    A `FakeServer` has one, open, as `server.network`. A TCP connection through it is a `Route`;
    what is done here to all of them can be done there to one.

    Args:
        target_port: the server's port on 127.0.0.1.
        round_trip: seconds from one side to the other and back. Every byte is delayed by half of
            it, each way; throughput is not limited. May be changed while running.
        on_change: called when a connection comes.

    Attributes:
        refuse: if true, every new connection is reset at once.
        stall_new: if true, every new connection is accepted and then nothing passes: it is frozen
            from the start.
        accepted: how many connections have come so far, whatever became of them.
    """

    def __init__(
        self,
        target_port: int,
        *,
        round_trip: float = 0.0,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.target_port = target_port
        self.round_trip = round_trip
        self.refuse = False
        self.stall_new = False
        self.accepted = 0
        self._on_change = on_change
        self._routes: list[Route] = []
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """The port on 127.0.0.1 that clients connect to."""
        if self._server is None:
            raise RuntimeError("the network is not open")
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def routes(self) -> list[Route]:
        """The connections that exist now, the oldest first."""
        return list(self._routes)

    def route_from(self, port: int) -> Route | None:
        """The connection that the server sees come from `port`; None if it is gone."""
        return next((route for route in self._routes if route.server_port == port), None)

    async def open(self) -> None:
        """Listens; `port` is known from here on."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Route(self)._client, HOST, 0)

    async def close(self) -> None:
        """Resets every connection, frozen or not; afterwards no socket and no task is left."""
        self.refuse = True  # those the kernel has accepted already
        self.reset()
        await asyncio.gather(*(route.wait_closed() for route in self.routes))
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    def freeze(self) -> None:
        """Makes all existing connections half-open; see `Route.freeze`."""
        for route in self.routes:
            route.freeze()

    def unfreeze(self) -> None:
        """Lets all frozen connections go on; see `Route.unfreeze`."""
        for route in self.routes:
            route.unfreeze()

    def reset(self) -> None:
        """Resets all existing connections; see `Route.reset`."""
        for route in self.routes:
            route.reset()

    def admit(self, route: Route) -> bool:
        """Counts a new connection. False if it has to be refused."""
        self.accepted += 1
        if not self.refuse:
            self._routes.append(route)
        self._on_change()
        return not self.refuse

    def forget(self, route: Route) -> None:
        self._routes.remove(route)
