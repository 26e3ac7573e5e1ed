"""Sequences of events that hypothesis makes up, against the rules of the pool.

The real `PoolManager`, `Pool` and `Connection` in virtual time; the WebSocket is a plain object.
"""

from __future__ import annotations

import asyncio
import gc
import math
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import aiohttp
from aiohttp import WSMsgType
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.clock import VirtualLoop, block
from tests.unit.pool_kit import no_fault
from xai_pool_patch.manager import PoolManager
from xai_pool_patch.options import PoolOptions, Warm
from xai_pool_patch.pool.clearing import CLEAR
from xai_pool_patch.pool.entries import Outcome
from xai_pool_patch.pool.pool import (
    ON_DEMAND,
    ON_DEMAND_LASTS,
    WARM,
    AcquireTimeoutError,
    DialFailedError,
    Pool,
)
from xai_pool_patch.protocol.connection import CLOSE_TIMEOUT, TEXT_CLEAR, Connection
from xai_pool_patch.protocol.request import Request
from xai_pool_patch.sessions import Store
from xai_pool_patch.sessions.shortage import Shortage

T = TypeVar("T")

HANDSHAKE = 0.4
ROUND_TRIP = 0.1
MAX_AGE = PoolOptions().max_age
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
MOST_DIALS = 21
"""In a row: three voices, each with seven attempts at pauses that double from 0.5 s up to 30 s."""
MOST_AT_ONCE = 60
"""Dials in one moment, which is more than there may be sessions."""
SECONDS_PER_DIAL = 20.0
"""Of what goes on for long: rotation, retries after a pause that has grown, connections on which no
PING is answered. Each that a pool keeps may be replaced as often."""
LONGEST_PAUSE = ON_DEMAND_LASTS + 1.0
"""Seconds after which a pool that was refused dials ahead again."""
VOICES = st.sampled_from(["ara", "eve", "rex"])


class TTS:
    voice = "ara"


class Connector:
    """What aiohttp limits the sockets of an HTTP session with; 0 is no limit."""

    limit = limit_per_host = 0


class Socket:
    """A WebSocket of which nobody but the pool is on the other side."""

    def __init__(self, world: World, voice: str) -> None:
        self.voice = voice
        self.clearing = world.clearing
        self.closes_after = world.closes_after
        self.answers_pings = world.answers_pings
        self.made_at = asyncio.get_running_loop().time()
        self.owes_audio = False
        self.is_open = True
        """The server counts it."""
        self.closed = False
        self._messages: asyncio.Queue[aiohttp.WSMessage] = asyncio.Queue()
        self._gone = asyncio.get_running_loop().create_future()
        self._world = world
        connection = SimpleNamespace(transport=self)
        self._response = SimpleNamespace(connection=connection, close=lambda: None)

    async def receive(self) -> aiohttp.WSMessage:
        return await self._messages.get()

    def _hear(self, delay: float, type_: WSMsgType, data: object) -> None:
        message = aiohttp.WSMessage(type_, data, None)
        asyncio.get_running_loop().call_later(delay, self._messages.put_nowait, message)

    async def ping(self, token: bytes) -> None:
        if self.answers_pings:
            self._hear(ROUND_TRIP, WSMsgType.PONG, token)

    async def send_str(self, frame: str, compress: int | None = None) -> None:
        assert frame == TEXT_CLEAR
        owed, self.owes_audio = self.owes_audio, False
        for delay, answers in CLEARS[self.clearing].items():
            for answer in [answer for answer in answers if owed or answer is not AUDIO]:
                self._hear(ROUND_TRIP + delay, WSMsgType.TEXT, answer)

    async def close(self) -> None:
        self.closed = True
        self._hear(0.0, WSMsgType.CLOSING, None)
        await asyncio.wait([self._gone], timeout=self.closes_after)
        self._end()

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True
        self._hear(0.0, WSMsgType.CLOSED, None)
        self._end()

    def end_by_peer(self) -> None:
        self.closed = True
        self._hear(0.0, WSMsgType.CLOSE, 1000)
        self._end()

    def _end(self) -> None:
        self.is_open = False
        if not self._gone.done():
            self._gone.set_result(None)
        self._world.place_is_free()


@dataclass
class World:
    """What the pools dial into: an HTTP session, and a server behind it."""

    sockets: list[Socket] = field(default_factory=list)
    next_dials: list[int | str] = field(default_factory=list)
    clearing: str = "acknowledged"
    """What the connections dialled from now on do."""
    answers_pings: bool = True
    """The same."""
    closes_after: float = 0.0
    """The same: seconds that the peer takes to answer a Close."""
    connector: Connector = field(default_factory=Connector)
    closed: bool = False
    limit: int = 1000
    """Open sockets above which a dial is refused."""
    handshake: float = HANDSHAKE
    """Seconds of a dial that is accepted, or refused."""
    dials: int = 0
    dials_now: int = 0
    """At the moment of the last dial."""
    last_dial: float = 0.0
    ran_away: bool = False
    in_handshake: int = 0
    _freed: list[asyncio.Future[None]] = field(default_factory=list)

    def request(self, voice: str) -> Request:
        session: Any = self
        url = f"wss://api.x.ai/v1/tts?voice={voice}"
        headers = {"Authorization": "Bearer key"}
        return Request(session, (url,), {"headers": headers}, max_age=math.inf)

    async def ws_connect(self, url: str, **_: object) -> Any:
        now = asyncio.get_running_loop().time()
        self.dials += 1
        self.dials_now = self.dials_now + 1 if now == self.last_dial else 1
        self.last_dial = now
        if self.dials_now > MOST_AT_ONCE:  # else the clock would stand still for ever
            self.ran_away = True
            await asyncio.sleep(1.0)
        await self._wait_for_place()
        self.in_handshake += 1
        try:
            await self._shake_hands(self.next_dials.pop(0) if self.next_dials else "accepted")
            self.sockets.append(Socket(self, url.rpartition("=")[2]))
        finally:
            self.in_handshake -= 1
            self.place_is_free()
        return self.sockets[-1]

    async def _wait_for_place(self) -> None:
        """As aiohttp's connector does."""
        while 0 < self.connector.limit <= len(self.open) + self.in_handshake:
            self._freed.append(asyncio.get_running_loop().create_future())
            await self._freed[-1]

    def place_is_free(self) -> None:
        freed, self._freed = self._freed, []
        for waiting in freed:
            if not waiting.done():
                waiting.set_result(None)

    async def _shake_hands(self, fate: int | str) -> None:
        await asyncio.sleep({"hangs": 1e9, "at once": 0.0}.get(str(fate), self.handshake))
        if fate == "reset":
            raise ConnectionResetError
        if isinstance(fate, int) or len(self.open) >= self.limit:
            info: Any = None
            status = fate if isinstance(fate, int) else 429
            raise aiohttp.WSServerHandshakeError(info, (), status=status)

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
        warm=st.sampled_from(["auto", "auto", "always", "reply"]),
    )
    def begin(self, min_size: int, clears: bool, warm: Warm) -> None:
        self.loop = VirtualLoop()
        self.complaints: list[Any] = []
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        self.options = PoolOptions(
            min_size=min_size,
            interruption="clear" if clears else "discard",
            warm=warm,
        )
        self.others = Others()
        uniform = random.Random(1).uniform
        shortage = Shortage("api.x.ai", self.loop.time, self.loop.time, uniform)
        self.world = World()
        self.ttss = [TTS()]
        self.turns: list[Turn] = []
        self.given_away: list[Connection] = []
        self.clears: dict[object, float] = {}
        """Each, and when it was first seen."""
        self.closes: dict[Socket, float] = {}
        """The same."""

        async def make() -> PoolManager:
            return PoolManager(
                self.options,
                no_fault,
                shortage_at=lambda host: shortage,
                store=self.others,
                make_room=lambda: self.pools.let_go(),
            )

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
            acquired = await pool.acquire(timeout, caller=caller)
            connection = acquired.connection
            socket: Any = connection.ws
            # The peer may end it between the hand-off and here, as it may a moment later.
            assert connection.is_reusable or (socket.closed and not acquired.reused)
            assert socket.voice == voice
            assert self.loop.time() - socket.made_at < MAX_AGE
            return connection

        def begin() -> None:
            pool = self.pools.register(tts, self.world.request(tts.voice), is_turn=True)
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
    @rule(data=st.data(), outcome=st.sampled_from(Outcome), in_the_middle=st.booleans())
    def end_turn(self, data: st.DataObject, outcome: Outcome, in_the_middle: bool) -> None:
        turn = self.pick(data, self.speaking)
        self.turns.remove(turn)
        if in_the_middle:
            socket: Any = turn.connection.ws  # type: ignore[union-attr]
            socket.owes_audio = True
            turn.connection.utterance.sent(TEXT)  # type: ignore[union-attr]
        self.inside(turn.pool.give_back, turn.connection, outcome)

    @precondition(lambda self: self.speaking)
    @rule(data=st.data(), listen=st.booleans(), with_others=st.booleans(), replays=st.booleans())
    def replace_what_failed(
        self, data: st.DataObject, listen: bool, with_others: bool, replays: bool
    ) -> None:
        turn = self.pick(data, self.speaking)
        self.turns.remove(turn)

        async def dial() -> Connection:
            acquired = await turn.pool.acquire(10.0, fresh=True)
            assert acquired.fresh
            return acquired.connection

        def give_up() -> None:
            turn.pool.evict(turn.connection, listen=listen, with_others=with_others)
            if replays:
                self.turns.append(Turn(turn.pool, self.loop.create_task(dial())))

        self.inside(give_up)

    @precondition(lambda self: self.speaking)
    @rule(data=st.data())
    def give_away(self, data: st.DataObject) -> None:
        turn = self.pick(data, self.speaking)
        self.turns.remove(turn)
        connection = turn.connection
        assert connection is not None
        connection.is_given_away = True
        self.inside(turn.pool.give_away, connection)
        self.given_away.append(connection)

    @precondition(lambda self: self.given_away)
    @rule(data=st.data())
    def close_what_was_given_away(self, data: st.DataObject) -> None:
        connection = self.pick(data, self.given_away)
        self.given_away.remove(connection)
        self.inside(connection.close)

    @precondition(lambda self: self.pools.pools)
    @rule()
    def let_go(self) -> None:
        had_idle = [pool for pool in self.pools.pools.values() if pool.idle]
        self.inside(self.pools.let_go)
        assert all(pool.mode is ON_DEMAND for pool in had_idle)
        assert not any(pool.idle for pool in had_idle)

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
            turn.pool.give_back(turn.connection, Outcome.FINISHED)
            waiting.task.cancel()

        self.inside(at_once)

    @precondition(lambda self: self.ttss)
    @rule(data=st.data(), voice=VOICES)
    def change_voice(self, data: st.DataObject, voice: str) -> None:
        tts = self.pick(data, self.ttss)
        tts.voice = voice
        if tts in self.pools.users:
            self.inside(self.pools.register, tts, self.world.request(voice))

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

    @rule(
        fates=st.lists(
            st.sampled_from([400, 401, 429, 503, "reset", "hangs", "at once", "accepted"]),
            max_size=3,
        )
    )
    def prepare_dials(self, fates: list[int | str]) -> None:
        self.world.next_dials = fates

    @rule(handshake=st.sampled_from([0.0, HANDSHAKE]))
    def dials_take(self, handshake: float) -> None:
        """Dials that end at once show what the pool does if nothing slows it down."""
        self.world.handshake = handshake

    @rule(seconds=st.sampled_from([0.0, 0.3, 3.0, 60.0]))
    def peers_answer_a_close(self, seconds: float) -> None:
        self.world.closes_after = seconds

    @rule(limit=st.sampled_from([0, 1, 2]))
    def limit_the_connector(self, limit: int) -> None:
        """Where it is full, nothing may be dialled ahead."""
        self.world.connector.limit = limit
        self.inside(self.world.place_is_free)
        self.inside(self.pools.place_is_free)

    @rule(answers=st.booleans())
    def peers_answer_pings(self, answers: bool) -> None:
        self.world.answers_pings = answers

    @precondition(lambda self: self.pools._hosts)
    @rule()
    def pongs_turn_out_to_prove_nothing(self) -> None:
        for host in self.pools._hosts.values():
            host.pongs_unordered = True

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
        """Whoever dials without an end does it here."""
        before, callers = self.world.dials, len(self.waiting)
        self.let(seconds)
        kept = len(self.pools.pools) * max(1, self.options.min_size)
        most = MOST_DIALS + callers + kept * seconds / SECONDS_PER_DIAL
        assert self.world.dials - before <= most, "dials without pause"

    def everything_works(self) -> None:
        world = self.world
        world.next_dials, world.clearing, world.limit = [], "acknowledged", 1000
        world.connector.limit, world.closes_after, world.answers_pings = 0, 0.0, True
        self.inside(world.place_is_free)
        self.inside(self.pools.place_is_free)

    @precondition(lambda self: self.pools.pools)
    @rule(data=st.data(), caller=st.sampled_from(CALLERS))
    def a_reply_is_expected_for_long(self, data: st.DataObject, caller: str) -> None:
        """Until after every pause, with nothing that fails: there is a connection for it."""
        self.everything_works()
        pool = self.pick(data, list(self.pools.pools.values()))
        until = self.loop.time() + LONGEST_PAUSE + 10.0
        self.inside(pool.expect, caller, until)
        self.let(LONGEST_PAUSE + 1.0)
        pauses = pool.backoff.next_attempt > self.loop.time()  # after a 401, for longer
        if not (pool.is_closed or self.speaking or pauses):
            assert pool.idle + pool.connecting + pool.clearing >= 1, "nobody dialled for it"
        self.inside(pool.withdraw, caller)

    @rule(seconds=st.sampled_from([0.3, 2.0]))
    def the_loop_is_blocked(self, seconds: float) -> None:
        self.inside(block, seconds)
        self.let(0.01)

    @rule()
    def rest(self) -> None:
        """Nothing fails for a while: then everything is as it should be."""
        self.everything_works()
        self.let(120.0)
        if any(pool.connecting for pool in self.pools.pools.values()):
            self.let(1.0)  # a rotation, of all moments in this one
        assert self.waiting == [], "a caller was forgotten"
        users = list(self.pools.users.values())  # it is an iterator
        for request, pool in self.pools.pools.items():
            is_used = any(user.current == request for user in users)
            least = self.options.min_size if is_used and pool.mode is WARM else 0
            assert pool.connecting == 0
            unused = pool.idle + pool.clearing
            assert pool.leased + unused <= max(least, pool.leased), "holds more than it uses"
            if pool.backoff.next_attempt <= self.loop.time():
                assert pool.leased + unused >= least, "keeps less than it should"

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
                assert now - began <= CLEAR.at_most

    @invariant()
    def what_was_given_away_is_left_alone(self) -> None:
        held = [each for pool in self.pools.pools.values() for each in pool.connections]
        for connection in self.given_away:
            assert connection.state.value in ("open", "lost")
            assert connection not in held

    @invariant()
    def a_pool_is_there_for_two_requests_of_a_tts(self) -> None:
        used = {request for user in self.pools.users.values() for request in user.requests}
        assert self.pools.pools.keys() == used

    @invariant()
    def no_close_goes_on_for_ever(self) -> None:
        for socket in self.world.open:
            if socket.closed:
                began = self.closes.setdefault(socket, self.loop.time())
                assert self.loop.time() - began <= CLOSE_TIMEOUT

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
    def nobody_dials_without_pause(self) -> None:
        assert not self.world.ran_away

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
                self.inside(turn.pool.give_back, turn.connection, Outcome.FINISHED)
        for connection in self.given_away:
            self.inside(connection.close)
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
