"""How long an API key's sessions count as scarce, and how processes hear of it from each other."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..mark import Mark, MarkStore
from ..telemetry.log import LogEvent, log_event

T = TypeVar("T")

THIS_PROCESS = "this process"

_NAME_SPACE = b"xai_pool_patch.sessions"

FIRST_LENGTH = 120.0
JITTER = 0.1
LONGEST_LENGTH = 1800.0
RECURRENCE = 300.0
"""Seconds after a mark's end in which a refusal makes a mark of twice the length."""
PLAUSIBLE = 2400.0
"""Seconds. A mark that lasts longer, or ends later, is nonsense or of another clock."""
SHARE = 0.25
"""Part of a mark's length over which processes spread their first dials after its end."""
SAME_END = 1.0
"""Seconds by which two ends of one mark may differ, since clocks of two machines do."""

TIMEOUT = 1.0
"""Seconds that one call of a store may take."""
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0
"""Seconds after a failed call until the next, doubling from the first to the longest."""
EARLY = 0.75
"""Part of a store's interval after which a look is due. The caller's timer is jittered: a look that
comes a bit early must not be left out, or the next would come almost two intervals late."""


@dataclass(frozen=True)
class _Known:
    """The last mark that a process knows. Times are those of the monotonic clock."""

    end: float
    length: float
    until: float
    """The end for this process, which waits a share of its own before it dials again."""
    source: str


_NOTHING = _Known(end=-math.inf, length=0.0, until=-math.inf, source="")


class SessionLimit:
    """What this process knows about the limit of one API key.

    The event loops and threads of the process share one object. It needs no lock: the state is one
    immutable value that is replaced at once. Of two threads that replace it at the same time, one
    loses a mark that ends about when the other's does.

    Args:
        monotonic: the clock that decides, in seconds. It does not jump.
        wall: seconds since the epoch, to exchange marks with other processes.
        jitter: spreads what processes would otherwise do at the same moment.
    """

    def __init__(
        self,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        jitter: random.Random | None = None,
    ) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._jitter = jitter or random.Random()
        self._known = _NOTHING
        self._seen: dict[str, Mark] = {}

    @property
    def is_reached(self) -> bool:
        """Sessions are scarce at this moment."""
        return self._monotonic() < self._known.until

    @property
    def until(self) -> float:
        """When `is_reached` ends, or has ended, on the monotonic clock; -inf without a mark."""
        return self._known.until

    @property
    def seconds_left(self) -> float:
        """Seconds until `is_reached` ends; 0.0 if it is false."""
        return max(0.0, self._known.until - self._monotonic())

    @property
    def source(self) -> str:
        """Where the last mark came from: `THIS_PROCESS`, a store's name, or "" without one."""
        return self._known.source

    def refused(self) -> Mark | None:
        """Take note of a dial that was refused for the limit.

        Returns:
            The mark to publish. None if the present one lasts for more than half of its length: a
            thousand refusals must not make a thousand writes.
        """
        now, known = self._monotonic(), self._known
        left = known.end - now
        if left <= 0.0:
            # Others may dial again since the end, but this process only since `until`. A refusal
            # that late recurs as well, however long the share was.
            left = min(0.0, known.until - now)
        length = self._renewed(known.length, left)
        return None if length is None else self._adopt(self._wall() + length, length)

    def learn(self, mark: Mark, source: str) -> None:
        """Take note of a mark that a store has. One that makes no sense is ignored.

        Each mark is converted to the monotonic clock once, when it is new. So when the wall clock
        jumps, the marks that are known end as they would have.
        """
        if mark == self._seen.get(source):
            return
        if self._is_plausible(mark):
            end = self._end_of(mark)
            if end > self._known.end + SAME_END:
                self._set(end, mark.length, source)
        self._seen[source] = mark

    def reconcile(self, mark: Mark, found: Mark | None) -> Mark | None:
        """Take note of what a store had when a mark of this process was to be published there.

        Returns:
            What `refused` would have returned, had this process known `found`: a longer mark than
            `mark` if `found` has ended a while ago, None if it lasts long enough.
        """
        if found is None or not self._is_plausible(found):
            return mark
        began = mark.until - mark.length
        length = self._renewed(found.length, found.until - began)
        if length is None or length <= mark.length:
            return None if length is None else mark
        return self._adopt(began + length, length)

    def _renewed(self, length: float, left: float) -> float | None:
        """The length of the mark that a refusal makes. None if it need not make one.

        Args:
            length: that of the mark before.
            left: seconds until that one's end; negative if it has ended.
        """
        if left > length / 2:
            return None
        first = FIRST_LENGTH * self._jitter.uniform(1.0 - JITTER, 1.0 + JITTER)
        if left > 0.0:
            return length
        return min(2.0 * length, LONGEST_LENGTH) if left >= -RECURRENCE else first

    def _adopt(self, until: float, length: float) -> Mark:
        mark = Mark(until, length)
        self._set(self._end_of(mark), length, THIS_PROCESS)
        return mark

    def _set(self, end: float, length: float, source: str) -> None:
        # One assignment of one value: a thread that reads never sees half of it.
        share = self._jitter.uniform(0.0, SHARE * length)
        self._known = _Known(end, length, end + share, source)

    def _is_plausible(self, mark: Mark) -> bool:
        ahead = mark.until - self._wall()
        return 0.0 < mark.length <= PLAUSIBLE and -RECURRENCE <= ahead <= PLAUSIBLE

    def _end_of(self, mark: Mark) -> float:
        """The end on the monotonic clock. Only a clock that jumped shows one beyond the length."""
        return self._monotonic() + min(mark.until - self._wall(), mark.length)


class _Operation:
    """Reading or writing one store, as one event loop does it: a failure costs nothing."""

    def __init__(self, store: MarkStore, name: str, jitter: random.Random) -> None:
        self._log = functools.partial(log_event, store=store.name, operation=name)
        self._jitter = jitter
        self._failures = 0
        self._next_attempt = -math.inf

    @property
    def is_due(self) -> bool:
        return _now() >= self._next_attempt

    @property
    def has_failed(self) -> bool:
        """The last attempt has."""
        return self._failures > 0

    async def attempt(self, call: Callable[[], Awaitable[T]]) -> T | None:
        """What the call returns; None if it fails, or has failed too short a time ago."""
        if not self.is_due:
            return None
        try:
            result = await asyncio.wait_for(call(), TIMEOUT)
        except Exception as error:
            self._failed(error)
            return None
        self._succeeded()
        return result

    def _failed(self, error: Exception) -> None:
        if not self.is_due:
            return  # one of several calls at the same time, of which another has failed already
        if self._failures == 0:
            self._log(LogEvent.MARK_STORE_FAILED, error=error)
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(self._failures, 10))
        self._failures += 1
        self._next_attempt = _now() + delay * self._jitter.uniform(0.8, 1.0)

    def _succeeded(self) -> None:
        if self._failures > 0:
            self._log(LogEvent.MARK_STORE_RESTORED)
        self._failures = 0
        self._next_attempt = -math.inf


class _View:
    """One store, as one event loop sees it.

    Reading and writing fail apart: a store that is full or read-only can still be read.
    """

    def __init__(self, store: MarkStore, jitter: random.Random) -> None:
        self.store = store
        self.reading = _Operation(store, "read", jitter)
        self.writing = _Operation(store, "write", jitter)
        self.unconfirmed: Mark | None = None
        """A mark of this process that was to be written, and has not been seen in the store yet."""
        self._next_look = -math.inf

    def begin_look(self) -> bool:
        """Whether a look is due. If so, the next one is an interval away."""
        is_due = _now() >= self._next_look and self.reading.is_due
        if is_due:
            self._next_look = _now() + EARLY * self.store.interval
        return is_due


class SharedMarks:
    """The marks of one API key that processes share through stores, as one event loop uses them.

    Nothing here raises, and no store waits for another.

    Args:
        digest: see `digest_of`.
        limit: learns what the stores know.
        stores: where others leave their marks.
        jitter: spreads the attempts of processes whose store has failed for all of them.
    """

    def __init__(
        self,
        digest: str,
        limit: SessionLimit,
        stores: Sequence[MarkStore],
        jitter: random.Random | None = None,
    ) -> None:
        self._digest = digest
        self._limit = limit
        jitter = jitter or random.Random()
        self._views = [_View(store, jitter) for store in stores]

    @property
    def are_unreadable(self) -> bool:
        """There are stores, and none of them works: this process hears of its own refusals only."""
        return bool(self._views) and all(view.reading.has_failed for view in self._views)

    async def look(self) -> None:
        """Learn what the stores know. Each is asked once in its interval, however often this runs.

        A mark that the store has not taken, or has lost at once, is published again.
        """
        views = [view for view in self._views if view.begin_look()]
        await asyncio.gather(*map(self._look, views))

    async def publish(self, mark: Mark) -> None:
        """Leave a mark, the result of `SessionLimit.refused`, for other processes."""
        await asyncio.gather(*(self._publish(mark, view) for view in self._views))

    async def _look(self, view: _View) -> None:
        if view.unconfirmed is not None and self._limit.is_reached:
            await self._publish(view.unconfirmed, view)
        else:
            view.unconfirmed = None
            await self._read(view)

    async def _publish(self, mark: Mark, view: _View) -> None:
        # The last mark may have ended within five minutes, before this process began.
        renewed = self._limit.reconcile(mark, await self._read(view))
        view.unconfirmed = renewed
        if renewed is not None:
            await view.writing.attempt(lambda: view.store.write(self._digest, renewed))

    async def _read(self, view: _View) -> Mark | None:
        async def learn() -> Mark | None:
            found = await view.store.read(self._digest)
            if found is not None:
                self._limit.learn(found, view.store.name)
            return found

        return await view.reading.attempt(learn)


def _now() -> float:
    return asyncio.get_running_loop().time()


def digest_of(api_key: str) -> str:
    """What stands for an API key where others can read it."""
    return hmac.new(_NAME_SPACE, api_key.encode(), hashlib.sha256).hexdigest()[:32]
