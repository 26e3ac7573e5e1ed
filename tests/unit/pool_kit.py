"""A pool over plain objects: dials that the test ends as it likes, in virtual time."""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.clock import in_virtual_time
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.pool.backoff import Backoff, FailureKind, RateLimit
from xai_pool_patch.pool.entries import Outcome
from xai_pool_patch.pool.pool import DialFailedError, Pool
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
    is_reusable: bool = True
    clear_round_trip: float | None = ROUND_TRIP
    sent_stale_audio: bool = False
    cleared_after: float = ROUND_TRIP
    acknowledges: bool = True
    """What the server says after a clear is that nothing more comes."""
    clears: int = 0
    is_open: bool = True
    closed_at: float | None = None
    closes_after: float = 0.1
    """Seconds that the peer takes to answer the Close."""
    listened: bool = False
    """It was closed after waiting for a sign of life."""
    _aborted: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    async def clear(self) -> None:
        assert self.is_open
        self.clears += 1
        self.is_reusable = False
        await asyncio.sleep(self.cleared_after)
        self.is_reusable = self.is_open and self.acknowledges

    def close(self, *, listen: bool = False) -> asyncio.Task[None]:
        assert self.is_open or not self.is_reusable, f"{self!r} is closed twice"
        self.is_open = self.is_reusable = False
        self.closed_at, self.listened = asyncio.get_running_loop().time(), listen
        return asyncio.ensure_future(self._shut())

    async def _shut(self) -> None:
        await asyncio.wait([self._aborted], timeout=self.closes_after)

    def abort_if_closing(self) -> None:
        if self.closed_at is not None:
            self._aborted.cancel()

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
    has_room: bool = True
    """There is a place for what no caller waits for."""
    asked_for_room_at: list[float] = field(default_factory=list)
    closed_at: list[float] = field(default_factory=list)
    """When a place became free."""

    on_dial_failed: Callable[[DialFailedError], None] = lambda failure: None

    async def connect(self, pool: Pool[Wire], timeout: float) -> Wire | DialFailedError:
        loop = asyncio.get_running_loop()
        self.dialled_at.append(loop.time())
        refusal = self.refuse.pop(0) if self.refuse else None
        hangs, self.hang_next = self.hang_next > 0, max(0, self.hang_next - 1)
        try:
            await asyncio.wait_for(asyncio.sleep(1e9 if hangs else self.handshake), timeout)
            if refusal is not None:
                raise RefusedError(refusal)
        except asyncio.TimeoutError as error:
            return DialFailedError(error, FailureKind.TRANSIENT)
        except RefusedError as error:
            return DialFailedError(error, error.failure_kind)
        wire = Wire(len(self.wires) + 1, loop.time())
        self.wires.append(wire)
        return wire

    def dial_failed(self, pool: Pool[Wire], failure: DialFailedError) -> None:
        self.on_dial_failed(failure)

    def is_defunct(self, pool: Pool[Wire]) -> bool:
        return self.is_gone

    def may_dial_ahead(self, pool: Pool[Wire]) -> bool:
        return self.has_room

    def make_room(self) -> None:
        self.asked_for_room_at.append(now())

    def place_is_free(self) -> None:
        self.closed_at.append(now())

    @property
    def open(self) -> list[Wire]:
        return [wire for wire in self.wires if wire.is_open]


class TakesBack:
    """A pool of which only how connections come back to it exists."""

    def __init__(self) -> None:
        self.came_back: list[object] = []
        self.metrics = PoolMetrics(pool=1)
        self.supervisor = Supervisor(no_fault)
        self.options = PoolOptions(answer_timeout=5.0)

    def give_back(self, connection: object, outcome: Outcome) -> None:
        self.came_back.append(outcome)

    def evict(self, connection: object, *, listen: bool, with_others: bool) -> None:
        self.came_back.append(("evicted", listen, with_others))

    def give_away(self, connection: object) -> None:
        self.came_back.append("given away")


def no_fault(operation: str, fault: Exception) -> None:
    raise AssertionError(f"a fault in {operation}") from fault


def make_pool(
    network: Network,
    options: PoolOptions | None = None,
    rate_limit: RateLimit | None = None,
) -> Pool[Wire]:
    jitter, options = random.Random(1), options or PoolOptions()
    return Pool(
        "key",
        network,
        options,
        supervisor=Supervisor(no_fault),
        backoff=Backoff(rate_limit or RateLimit(), jitter),
        metrics=PoolMetrics(pool=1),
        max_age=options.max_age,
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
        pool.give_back(wire, Outcome.FAILED)
    await pool.aclose()
    assert pool.is_empty, pool
    assert network.open == []


async def leased(pool: Pool[Wire]) -> Wire:
    return (await pool.acquire(10.0)).connection


async def idle(pool: Pool[Wire], count: int) -> list[Wire]:
    wires = list(await asyncio.gather(*(leased(pool) for _ in range(count))))
    for wire in wires:
        pool.give_back(wire, Outcome.FINISHED)
    return wires


def now() -> float:
    return asyncio.get_running_loop().time()


def about(seconds: float) -> Any:
    """Equal to that time or duration, but for what reading the clock takes."""
    return pytest.approx(seconds, rel=0.0, abs=1e-5)
