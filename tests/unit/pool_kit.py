"""A pool over plain objects: dials that the test ends as it likes, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from xai_pool_patch.backoff import Account, Backoff, Setback
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.pool import Pool
from xai_pool_patch.telemetry import Counters

HANDSHAKE = 0.45


class RefusedError(Exception):
    def __init__(self, setback: Setback) -> None:
        self.setback = setback


@dataclass(eq=False)
class Wire:
    """A connection of which only the pool's view exists."""

    number: int
    made_at: float
    on_lost: Callable[[], None] | None = None
    is_reusable: bool = True
    is_open: bool = True
    closed_at: float | None = None

    def close(self) -> asyncio.Task[None]:
        assert self.is_open or not self.is_reusable, f"{self!r} is closed twice"
        self.is_open = self.is_reusable = False
        self.closed_at = asyncio.get_running_loop().time()
        return asyncio.ensure_future(asyncio.sleep(0.1))

    def break_off(self) -> None:
        """The peer ends it."""
        self.is_reusable = False
        assert self.on_lost is not None
        self.on_lost()


@dataclass(eq=False)
class Network:
    """Where the pool dials."""

    handshake: float = HANDSHAKE
    refuse: list[Setback | None] = field(default_factory=list)
    """What the next dials end with; None is a success, as is everything after the list."""
    hang_next: int = 0
    wires: list[Wire] = field(default_factory=list)
    dialled_at: list[float] = field(default_factory=list)
    is_gone: bool = False

    async def connect(self, timeout: float) -> Wire:
        loop = asyncio.get_running_loop()
        self.dialled_at.append(loop.time())
        refusal = self.refuse.pop(0) if self.refuse else None
        hangs, self.hang_next = self.hang_next > 0, max(0, self.hang_next - 1)
        try:
            await asyncio.wait_for(asyncio.sleep(1e9 if hangs else self.handshake), timeout)
        except asyncio.TimeoutError:
            raise RefusedError(Setback.PASSING) from None
        if refusal is not None:
            raise RefusedError(refusal)
        wire = Wire(len(self.wires) + 1, loop.time())
        self.wires.append(wire)
        return wire

    @property
    def open(self) -> list[Wire]:
        return [wire for wire in self.wires if wire.is_open]


def setback_of(error: Exception) -> Setback:
    assert isinstance(error, RefusedError)
    return error.setback


def make_pool(
    network: Network, options: PoolOptions | None = None, account: Account | None = None
) -> Pool[Wire]:
    jitter = random.Random(1)
    return Pool(
        network.connect,
        options or PoolOptions(),
        standby_timeout=10.0,
        backoff=Backoff(account or Account(), jitter),
        counters=Counters(),
        setback_of=setback_of,
        is_defunct=lambda: network.is_gone,
        jitter=jitter,
    )
