"""The one bit that a process has for each host: a process was refused there a moment ago."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ..telemetry.log import LogEvent, log_event

LENGTH, JITTER = 120.0, 0.1
"""Seconds from the last refusal on, and the part by which they differ. Simulated over twenty
minutes, with 75 and 150 calls on 50 sessions, a length that doubles gains nothing."""
SPREAD = 30.0
"""Seconds after the end over which the processes that know of it dial again."""
STEP = 15.0
"""Seconds after a refusal in which another changes nothing, more than by which `LENGTH` varies: a
thousand refusals must not make a thousand writes."""
LONGEST = LENGTH * (1.0 + JITTER)
PLAUSIBLE = 2.0 * LENGTH
"""Seconds. An end further ahead is nonsense, or from a clock that is too wrong to be believed."""
SAME_END = 1.0
"""Seconds by which two ends may differ and still be one, since clocks of two machines do."""
LONG = 600.0
"""Seconds of refusals without a pause that are worth a warning."""


@dataclass(frozen=True)
class _Known:
    """Times are those of the monotonic clock."""

    end: float = -math.inf
    refused_end: float = -math.inf
    """By the last refusal of any process, which a failed handshake may have put off."""
    own_end: float = -math.inf
    """By the last refusal of this process."""
    share: float = 0.0
    """Seconds that this process waits after the end."""
    began: float = -math.inf
    reason: str = ""


@dataclass(eq=False)
class Shortage:
    """What a process knows about one host. Its event loops and threads share one object.

    It needs no lock: what is known is one immutable value that is replaced at once. Of two threads
    that replace it at the same time, one loses an end that is about the other's.

    Args:
        host: the URL's.
        monotonic: the clock that decides, in seconds. It does not jump.
        wall: seconds since the epoch, to exchange ends with other processes.
        uniform: spreads what processes would otherwise do at the same moment. After a fork, that of
            the module `random` differs in each process.
    """

    host: str
    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    uniform: Callable[[float, float], float] = random.uniform
    _known: _Known = field(default=_Known(), init=False)
    _last_read: float | None = field(default=None, init=False)
    _warned_of: float = field(default=-math.inf, init=False)

    def __repr__(self) -> str:
        return f"<Shortage at {self.host}, {self.seconds_left:.0f} s left>"

    @property
    def is_on(self) -> bool:
        return self.monotonic() < self.until

    @property
    def until(self) -> float:
        """When it ends, or has ended, on the monotonic clock; -inf if there was none."""
        known = self._known  # once: another thread may replace it
        return known.end + known.share

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.until - self.monotonic())

    @property
    def reason(self) -> str:
        """What the last of it was."""
        return self._known.reason

    def refused(self, status: int | None) -> bool:
        """Take note of a refusal that this process met. Returns whether others need to hear of it.

        Args:
            status: of the handshake; None if the server said so in another way.
        """
        now = self.monotonic()
        # Not by `end`: of a failed handshake a moment ago, others have not heard.
        is_news = self._known.refused_end - now <= LENGTH - STEP
        if is_news:
            end = self._end_after(now)
            self._extend(now, end, "a refusal to this process", refused_end=end, own_end=end)
        began = self._known.began
        if now - began > LONG and began != self._warned_of:
            self._warned_of = began
            seconds = round(now - began, 1)
            log_event(LogEvent.SHORTAGE_LASTS, host=self.host, status=status, for_s=seconds)
        return is_news

    def failed(self) -> None:
        """Take note of a handshake that failed on its way to the server, or was stopped by a proxy.

        It may have been a refusal, so this process is careful. Others do not hear of it: one
        machine's bad line must not cost a fleet.
        """
        now = self.monotonic()
        if self._known.end - now <= LENGTH - STEP:
            self._extend(now, self._end_after(now), "a failed handshake")

    def learn(self, until: float | None) -> None:
        """Take note of the end that a store has. One that makes no sense is ignored.

        Each is converted to the monotonic clock once, when it is new. So when the wall clock jumps,
        what is known ends as it would have.
        """
        if until is not None and until != self._last_read:
            self._last_read = until
            now = self.monotonic()
            end = self._end_of(until, now)
            if end > max(now, self._known.refused_end + SAME_END):
                self._extend(now, end, "a refusal to another process", refused_end=end)

    def news_for(self, until: float | None) -> float | None:
        """The end that a store should have in place of that one; None if it need not change."""
        now, own_end = self.monotonic(), self._known.own_end
        end_there = -math.inf if until is None else self._end_of(until, now)
        is_news = own_end > max(now, end_there + SAME_END)
        return self.wall() + own_end - now if is_news else None

    def _end_after(self, now: float) -> float:
        return now + LENGTH * self.uniform(1.0 - JITTER, 1.0 + JITTER)

    def _extend(self, now: float, end: float, reason: str, **others: float) -> None:
        is_on = now < self.until
        known = self._known if is_on else _Known(share=self.uniform(0.0, SPREAD), began=now)
        # One assignment of one value: a thread that reads never sees half of it.
        self._known = replace(known, end=max(end, known.end), reason=reason, **others)

    def _end_of(self, until: float, now: float) -> float:
        """The end on the monotonic clock; -inf for one that makes no sense."""
        ahead = until - self.wall()
        return now + min(ahead, LONGEST) if ahead <= PLAUSIBLE else -math.inf
