"""Sequences of events that hypothesis makes up, against the rules of the pool.

The real `PoolManager`, `Pool` and `Connection` in virtual time; the WebSocket is a plain object.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
from aiohttp import WSMsgType
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.pool_kit import no_fault
from tests.virtual import VirtualLoop, block
from xai_pool_patch.manager import Connect, PoolKey, PoolManager
from xai_pool_patch.options import PoolOptions, Warm
from xai_pool_patch.pool.pool import AcquireTimeoutError, DialFailedError, Pool, Reason
from xai_pool_patch.protocol.connection import TEXT_CLEAR, Connection
from xai_pool_patch.sessions import Store
from xai_pool_patch.sessions.shortage import Shortage

T = TypeVar("T")

HANDSHAKE = 0.4
ROUND_TRIP = 0.1
MAX_AGE = 1800.0
TEXT, CLEARED = '{"type":"text.delta","delta":"Hello"}', '{"type":"audio.clear"}'
AUDIO, ERROR = '{"type":"audio.delta","delta":"AAAA"}', '{"type":"error","message":"no"}'
CLEARS = {
    "acknowledged": {0.0: [AUDIO, CLEARED]},
    "late": {0.0: [AUDIO], 0.45: [CLEARED]},
    "too late": {0.7: [CLEARED]},
    "ignored": {},
    "refused": {0.0: [ERROR]},
    "leaking": {0.0: [CLEARED], 0.2: [AUDIO]},
    "twice": {0.0: [CLEARED, CLEARED]},
}
"""What comes of a clear, by the seconds over the round trip that it takes."""
CALLERS = ["Ann", "Bob"]
VOICES = st.sampled_from(["ara", "eve", "rex"])


class Session:
    closed = False


class TTS:
    voice = "ara"


class Socket:
    """A WebSocket of which nobody but the pool is on the other side."""

    def __init__(self, voice: str, clearing: str) -> None:
        self.voice = voice
        self.clearing = clearing
        self.made_at = asyncio.get_running_loop().time()
        self.owes_audio = False
        self.is_open = True
        self.closed = False
        self._messages: asyncio.Queue[aiohttp.WSMessage] = asyncio.Queue()

    async def receive(self) -> aiohttp.WSMessage:
        return await self._messages.get()

    async def ping(self, token: bytes) -> None:
        self._messages.put_nowait(aiohttp.WSMessage(WSMsgType.PONG, token, None))

    async def send_str(self, frame: str, compress: int | None = None) -> None:
        assert frame == TEXT_CLEAR
        owed, self.owes_audio = self.owes_audio, False
        for delay, answers in CLEARS[self.clearing].items():
            for answer in [answer for answer in answers if owed or answer is not AUDIO]:
                message = aiohttp.WSMessage(WSMsgType.TEXT, answer, None)
                asyncio.get_running_loop().call_later(
                    ROUND_TRIP + delay, self._messages.put_nowait, message
                )

    async def close(self) -> None:
        self.is_open, self.closed = False, True
        self._messages.put_nowait(aiohttp.WSMessage(WSMsgType.CLOSING, None, None))

    def end_by_peer(self) -> None:
        self.is_open, self.closed = False, True
        self._messages.put_nowait(aiohttp.WSMessage(WSMsgType.CLOSE, 1000, ""))


class RefusedError(Exception):
    def __init__(self, status: int) -> None:
        self.status = status


@dataclass
class World:
    """What the pools dial into."""

    sockets: list[Socket] = field(default_factory=list)
    next_dials: list[int | str] = field(default_factory=list)
    clearing: str = "acknowledged"
    """What the connections dialled from now on do."""
    session: Session = field(default_factory=Session)
    limit: int = 1000
    """Open sockets above which a dial is refused."""

    def at(self, voice: str) -> tuple[PoolKey, Callable[[], Connect]]:
        async def connect(timeout: float) -> Any:
            fate = self.next_dials.pop(0) if self.next_dials else "accepted"
            await asyncio.wait_for(asyncio.sleep(1e9 if fate == "hangs" else HANDSHAKE), timeout)
            if isinstance(fate, int):
                raise RefusedError(fate)
            if len(self.open) >= self.limit:
                raise RefusedError(429)
            self.sockets.append(Socket(voice, self.clearing))
            return self.sockets[-1]

        session: Any = self.session
        return PoolKey("key", session, (("voice", voice),)), lambda: connect

    @property
    def open(self) -> list[Socket]:
        return [socket for socket in self.sockets if socket.is_open]


class Others(Store):
    """What other processes know."""

    name = "others"

    def __init__(self) -> None:
        self.until: float | None = None

    async def read(self, host: str) -> float | None:
        return self.until

    async def write(self, host: str, until: float) -> None:
        self.until = until

    async def probe(self, host: str) -> None: ...


@dataclass(eq=False)
class Turn:
    pool: Pool[Connection]
    task: asyncio.Task[Connection]

    @property
    def connection(self) -> Connection | None:
        done = self.task.done() and not self.task.cancelled() and not self.task.exception()
        return self.task.result() if done else None


class Agents(RuleBasedStateMachine):
    @initialize(
        min_size=st.integers(0, 2),
        clears=st.booleans(),
        verifies=st.booleans(),
        warm=st.sampled_from(["auto", "auto", "always", "reply"]),
    )
    def begin(self, min_size: int, clears: bool, verifies: bool, warm: Warm) -> None:
        self.loop = VirtualLoop()
        self.complaints: list[Any] = []
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        self.options = PoolOptions(
            min_size=min_size,
            max_age=MAX_AGE,
            interruption="clear" if clears else "discard",
            verify_after=30.0 if verifies else None,
            warm=warm,
        )
        self.others = Others()
        uniform = random.Random(1).uniform
        shortage = Shortage("api.x.ai", self.loop.time, self.loop.time, uniform)
        self.world = World()
        self.ttss = [TTS()]
        self.turns: list[Turn] = []
        self.clears: dict[object, float] = {}
        """Each, and when it was first seen."""

        async def make() -> PoolManager:
            return PoolManager(self.options, no_fault, shortage, self.others)

        self.pools = self.loop.run_until_complete(make())
        self.pools._jitter.seed(1)

    def let(self, seconds: float = 0.0) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))

    def inside(self, function: Any, *args: Any) -> Any:
        """Calls it as from a callback of the loop."""

        async def call() -> Any:
            return function(*args)

        return self.loop.run_until_complete(call())

    def pick(self, data: st.DataObject, things: list[T]) -> T:
        """By number: hypothesis keeps what it drew, and a TTS must be free to be collected."""
        return things[data.draw(st.integers(0, len(things) - 1))]

    @property
    def speaking(self) -> list[Turn]:
        return [turn for turn in self.turns if turn.connection is not None]

    @property
    def waiting(self) -> list[Turn]:
        return [turn for turn in self.turns if not turn.task.done()]

    # What agents do

    @rule(voice=VOICES)
    def another_tts(self, voice: str) -> None:
        if len(self.ttss) < 4:
            self.ttss.append(TTS())
            self.ttss[-1].voice = voice

    @precondition(lambda self: self.ttss)
    @rule(
        data=st.data(),
        timeout=st.sampled_from([0.1, 2.0, 10.0]),
        caller=st.sampled_from([None, *CALLERS]),
        settle=st.booleans(),
    )
    def ask(self, data: st.DataObject, timeout: float, caller: str | None, settle: bool) -> None:
        tts = self.pick(data, self.ttss)

        async def acquire(pool: Pool[Connection], voice: str) -> Connection:
            connection = (await pool.acquire(timeout, caller=caller)).connection
            socket: Any = connection.ws
            assert connection.is_reusable
            assert socket.voice == voice
            assert self.loop.time() - socket.made_at < MAX_AGE
            return connection

        def begin() -> None:
            pool = self.pools.register(tts, *self.world.at(tts.voice))
            self.turns.append(Turn(pool, self.loop.create_task(acquire(pool, tts.voice))))

        self.inside(begin)
        if settle:
            self.let()

    @precondition(lambda self: self.pools.pools)
    @rule(
        data=st.data(), caller=st.sampled_from(CALLERS), seconds=st.sampled_from([0.0, 1.0, 10.0])
    )
    def show_signs_of_a_reply(self, data: st.DataObject, caller: str, seconds: float) -> None:
        pool = self.pick(data, list(self.pools.pools.values()))
        self.inside(lambda: pool.expect(caller, self.loop.time() + seconds))

    @precondition(lambda self: self.pools.pools)
    @rule(data=st.data(), caller=st.sampled_from(CALLERS))
    def end_a_reply_without_a_word(self, data: st.DataObject, caller: str) -> None:
        self.inside(self.pick(data, list(self.pools.pools.values())).withdraw, caller)

    @precondition(lambda self: self.pools.pools)
    @rule(data=st.data())
    def prewarm(self, data: st.DataObject) -> None:
        self.inside(self.pick(data, list(self.pools.pools.values())).prewarm)

    @precondition(lambda self: self.speaking)
    @rule(data=st.data(), how=st.sampled_from(["completed", "failed", "interrupted", "cut early"]))
    def end_turn(self, data: st.DataObject, how: str) -> None:
        turn = self.pick(data, self.speaking)
        self.turns.remove(turn)
        if how == "completed":
            self.inside(turn.pool.release, turn.connection)
        elif how == "failed":
            self.inside(turn.pool.discard, turn.connection, Reason.FAILED)
        else:
            if how == "interrupted":
                socket: Any = turn.connection.ws  # type: ignore[union-attr]
                socket.owes_audio = True
                turn.connection.utterance.sent(TEXT)  # type: ignore[union-attr]
            self.inside(turn.pool.release_cut_off, turn.connection)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        self.pick(data, self.waiting).task.cancel()

    @precondition(lambda self: self.speaking and self.waiting)
    @rule(data=st.data())
    def give_up_in_the_moment_of_a_release(self, data: st.DataObject) -> None:
        turn = self.pick(data, self.speaking)
        waiting = self.pick(data, self.waiting)
        self.turns.remove(turn)

        def at_once() -> None:
            turn.pool.release(turn.connection)
            waiting.task.cancel()

        self.inside(at_once)

    @precondition(lambda self: self.ttss)
    @rule(data=st.data(), voice=VOICES)
    def change_voice(self, data: st.DataObject, voice: str) -> None:
        tts = self.pick(data, self.ttss)
        tts.voice = voice
        if self.pools.knows(tts):
            self.inside(self.pools.register, tts, *self.world.at(voice))

    @precondition(lambda self: self.ttss)
    @rule(data=st.data(), collected=st.booleans())
    def end_tts(self, data: st.DataObject, collected: bool) -> None:
        tts = self.pick(data, self.ttss)
        self.ttss.remove(tts)
        if not collected:
            self.inside(self.pools.unregister, tts)
        del tts
        gc.collect(0)
        self.let()

    # What the world does

    @rule(fates=st.lists(st.sampled_from([400, 401, 429, 503, "hangs", "accepted"]), max_size=3))
    def prepare_dials(self, fates: list[int | str]) -> None:
        self.world.next_dials = fates

    @rule(limit=st.sampled_from([0, 1, 2, 1000]))
    def limit_the_sessions(self, limit: int) -> None:
        self.world.limit = limit

    @rule(seconds=st.sampled_from([5.0, 120.0]))
    def others_are_refused(self, seconds: float) -> None:
        self.others.until = self.loop.time() + seconds

    @rule(clearing=st.sampled_from(sorted(CLEARS)))
    def answer_clears(self, clearing: str) -> None:
        self.world.clearing = clearing

    @precondition(lambda self: self.world.open)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.inside(self.pick(data, self.world.open).end_by_peer)
        self.let()

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.39, 0.4, 1.0, 11.0, 61.0, 1700.0, 4000.0]))
    def time_passes(self, seconds: float) -> None:
        self.let(seconds)

    @rule(seconds=st.sampled_from([0.3, 2.0]))
    def the_loop_is_blocked(self, seconds: float) -> None:
        self.inside(block, seconds)
        self.let(0.01)

    @rule()
    def rest(self) -> None:
        """Nothing fails for a while: then everything is as it should be."""
        self.world.next_dials, self.world.clearing, self.world.limit = [], "acknowledged", 1000
        self.let(120.0)
        if any(pool.connecting for pool in self.pools.pools.values()):
            self.let(1.0)  # a rotation, of all moments in this one
        assert self.waiting == [], "a caller was forgotten"
        for key, pool in self.pools.pools.items():
            used = any(
                tts.voice == dict(key.options)["voice"] and self.pools.knows(tts)
                for tts in self.ttss
            )
            least = self.options.min_size if used and not pool.is_lean else 0
            assert pool.connecting == 0
            unused = pool.idle + pool.clearing
            assert pool.leased + unused <= max(least, pool.leased), "holds more than it uses"

    # What holds at all times

    @invariant()
    def every_caller_has_a_connection_of_its_own(self) -> None:
        connections = [turn.connection for turn in self.speaking]
        assert len(set(map(id, connections))) == len(connections)

    @invariant()
    def a_connection_in_use_is_not_closed_by_the_pool(self) -> None:
        for turn in self.speaking:
            state = turn.connection.state.value  # type: ignore[union-attr]
            assert state in ("open", "lost"), state

    @invariant()
    def no_clear_goes_on_for_ever(self) -> None:
        now = self.loop.time()
        for pool in self.pools.pools.values():
            for clear in pool._clearing.under_way.values():
                began = self.clears.setdefault(clear, now)
                assert now - began <= self.options.clear_timeout

    @invariant()
    def at_most_two_voices_each(self) -> None:
        for tts in self.ttss:
            if self.pools.knows(tts):
                assert len(self.pools._users[tts].visited) <= 2

    @invariant()
    def warm_and_lean_are_as_the_options_say(self) -> None:
        lean = {pool.is_lean for pool in self.pools.pools.values()}
        if self.options.warm != "auto":
            assert lean <= {self.options.warm == "reply"}

    @invariant()
    def failures_are_those_that_callers_know(self) -> None:
        for turn in [turn for turn in self.turns if turn.task.done()]:
            error = None if turn.task.cancelled() else turn.task.exception()
            assert error is None or isinstance(error, (DialFailedError, AcquireTimeoutError))
            if turn.connection is None:
                self.turns.remove(turn)

    @invariant()
    def no_more_sessions_than_asked_for(self) -> None:
        """One a turn, those kept, what a burst left, and one a pool during rotation."""
        dialling = sum(pool.connecting for pool in self.pools.pools.values())
        assert len(self.world.open) + dialling <= 60

    def teardown(self) -> None:
        if not hasattr(self, "pools"):
            return
        for turn in self.turns:
            turn.task.cancel()
            if turn.connection is not None:
                self.inside(turn.pool.release, turn.connection)
        self.inside(self.pools.close)
        self.let(30.0)
        assert self.world.open == [], "left open"
        tasks = asyncio.all_tasks(self.loop)
        assert not tasks, f"left behind: {tasks}"
        assert not self.complaints, self.complaints
        self.loop.close()


TestAgents = Agents.TestCase
TestAgents.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
