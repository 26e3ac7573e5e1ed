"""A pool over plain objects: dials that the test ends as it likes, in virtual time."""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from tests.virtual import in_virtual_time
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.pool.backoff import Backoff, FailureKind, RateLimit
from xai_pool_patch.pool.pool import Pool, Reason
from xai_pool_patch.pool.supervisor import Supervisor
from xai_pool_patch.telemetry.pool_metrics import PoolMetrics

HANDSHAKE = 0.45
ROUND_TRIP = 0.15


class RefusedError(Exception):
    def __init__(self, failure_kind: FailureKind) -> None:
        self.failure_kind = failure_kind


@dataclass(eq=False)
class Wire:
    """A connection of which only the pool's view exists."""

    number: int
    made_at: float
    on_lost: Callable[[], None] | None = None
    on_stale_audio: Callable[[], None] | None = None
    is_reusable: bool = True
    round_trip: float | None = ROUND_TRIP
    sent_stale_audio: bool = False
    cleared_after: float = ROUND_TRIP
    is_clearable: bool = True
    clears: int = 0
    is_open: bool = True
    closed_at: float | None = None

    async def clear(self) -> None:
        assert self.is_open
        self.clears += 1
        self.is_reusable = False
        await asyncio.sleep(self.cleared_after)
        self.is_reusable = self.is_open and self.is_clearable

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
    refuse: list[FailureKind | None] = field(default_factory=list)
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
            raise RefusedError(FailureKind.TRANSIENT) from None
        if refusal is not None:
            raise RefusedError(refusal)
        wire = Wire(len(self.wires) + 1, loop.time())
        self.wires.append(wire)
        return wire

    @property
    def open(self) -> list[Wire]:
        return [wire for wire in self.wires if wire.is_open]


class TakesBack:
    """A pool of which only how connections come back to it exists."""

    is_lean = False

    def __init__(self) -> None:
        self.came_back: list[object] = []

    def release(self, connection: object) -> None:
        self.came_back.append("released")

    def release_cut_off(self, connection: object) -> None:
        self.came_back.append("released cut off")

    def discard(self, connection: object, reason: Reason) -> None:
        self.came_back.append(reason)

    def evict(self, connection: object) -> None:
        self.came_back.append("evicted")


def no_fault(operation: str, fault: Exception) -> None:
    raise AssertionError(f"a fault in {operation}") from fault


def failure_kind_of(error: Exception) -> FailureKind:
    assert isinstance(error, RefusedError)
    return error.failure_kind


def make_pool(
    network: Network,
    options: PoolOptions | None = None,
    rate_limit: RateLimit | None = None,
    on_rate_limited: Callable[[], object] = lambda: None,
) -> Pool[Wire]:
    jitter = random.Random(1)
    return Pool(
        network.connect,
        options or PoolOptions(),
        supervisor=Supervisor(no_fault, close_timeout=1.0),
        standby_timeout=10.0,
        backoff=Backoff(rate_limit or RateLimit(), jitter),
        metrics=PoolMetrics(pool=1),
        failure_kind_of=failure_kind_of,
        on_rate_limited=on_rate_limited,
        is_defunct=lambda: network.is_gone,
        jitter=jitter,
    )


AsyncTest = Callable[..., Coroutine[Any, Any, None]]


def with_pool(options: PoolOptions | None = None) -> Callable[[AsyncTest], Callable[..., None]]:
    """Decorates an async test that takes a `pool`, a `network`, or both, beside its fixtures.

    The test runs in virtual time. The pool has to leave nothing behind when it is closed after it.
    """

    def decorate(test: AsyncTest) -> Callable[..., None]:
        signature = inspect.signature(test)
        fixtures = [p for name, p in signature.parameters.items() if name not in PROVIDED]

        @functools.wraps(test)
        async def on_a_pool(**kwargs: Any) -> None:
            network = Network()
            pool = make_pool(network, options)
            provided = {"network": network, "pool": pool}
            wanted = {name: provided[name] for name in PROVIDED & signature.parameters.keys()}
            await test(**wanted, **kwargs)
            await close_all(network, pool)

        # pytest looks for a fixture for each parameter that it finds here.
        on_a_pool.__signature__ = signature.replace(parameters=fixtures)  # type: ignore[attr-defined]
        return in_virtual_time(on_a_pool)

    return decorate


PROVIDED = {"network", "pool"}
"""What `with_pool` passes to the test that it decorates."""


async def close_all(network: Network, pool: Pool[Wire]) -> None:
    """Close the pool as an application does, and check that nothing is left of it."""
    pool.close()
    for wire in network.open:
        pool.discard(wire, Reason.INTERRUPTED)
    await pool.aclose()
    assert pool.is_empty, pool
    assert network.open == []


async def leased(pool: Pool[Wire]) -> Wire:
    return (await pool.acquire(10.0)).connection


async def idle(pool: Pool[Wire], count: int) -> list[Wire]:
    wires = list(await asyncio.gather(*(leased(pool) for _ in range(count))))
    for wire in wires:
        pool.release(wire)
    return wires


def now() -> float:
    return asyncio.get_running_loop().time()
