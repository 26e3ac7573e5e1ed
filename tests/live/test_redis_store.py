"""S3, S3b: the fleet's Redis, with a real server that is killed, paused, and refuses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import redis
import trustme

from tests.kit import event_of
from tests.live.forks import fork_that_reads
from tests.live.redis_kit import RedisServer, redis_server
from tests.unit.pool_kit import no_fault
from xai_pool_patch.errors import InvalidOptionError
from xai_pool_patch.pool.supervisor import Supervisor
from xai_pool_patch.sessions import Store, store_from
from xai_pool_patch.sessions.machine import MachineStore
from xai_pool_patch.sessions.redis import RedisStore
from xai_pool_patch.sessions.shortage import Shortage
from xai_pool_patch.sessions.watch import ShortageWatch

pytestmark = pytest.mark.real_time

HOST = "api.x.ai"
KEY = f"xai_pool_patch:shortage:{HOST}"
PASSWORD = "hunter2hunter2"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test machine that is busy must not look like a Redis that is slow."""
    monkeypatch.setattr("xai_pool_patch.sessions.watch.TIMEOUT", 60.0)
    monkeypatch.setattr("xai_pool_patch.sessions.redis.TIMEOUT", 30.0)


@pytest.fixture
def usual_timeouts(patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a Redis that never answers."""
    monkeypatch.setattr("xai_pool_patch.sessions.watch.TIMEOUT", 1.0)
    monkeypatch.setattr("xai_pool_patch.sessions.redis.TIMEOUT", 0.8)


@pytest.fixture(autouse=True)
def log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "xai_pool_patch")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RedisServer]:
    async with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
async def store(server: RedisServer) -> AsyncIterator[RedisStore]:
    store = RedisStore(server.url)
    yield store
    await store.aclose()


def in_seconds(seconds: float = 100.0) -> float:
    return time.time() + seconds


class Process:
    """What one process knows and asks."""

    def __init__(self, store: Store) -> None:
        self.shortage = Shortage(HOST)
        self.watch = ShortageWatch(
            self.shortage,
            store,
            supervisor=Supervisor(no_fault),
            on_change=lambda: None,
            wants_to_know=lambda: True,
        )

    async def looked(self) -> None:
        """The look that has begun is over."""
        assert self.watch._look is not None
        await self.watch._look

    async def until(self, seen: Callable[[], bool]) -> None:
        while not seen():
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def process(store: Store) -> AsyncIterator[Process]:
    """One whose first look has ended."""
    process = Process(store)
    process.watch.begin()
    await process.looked()
    try:
        yield process
    finally:
        process.watch.end()
        await asyncio.wait([process.watch._look])  # type: ignore[list-item]


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged of the store: the event and the operation."""
    return [
        f"{event_of(record)} {getattr(record, 'xai_pool_operation', '')}".strip()
        for record in caplog.records
        if event_of(record).startswith("session store")
    ]


async def is_lean_at_once(url: str, caplog: pytest.LogCaptureFixture) -> str:
    """Nothing is raised, and it is logged once. Returns the operation that failed."""
    store = RedisStore(url)
    try:
        began = time.monotonic()
        async with process(store) as unheard:
            assert time.monotonic() - began < 20.0
            assert unheard.watch.is_lean
            assert not unheard.shortage.is_on
            unheard.watch.refused(429)
            assert unheard.shortage.is_on
        [line] = logged(caplog)
        return line.removeprefix("session store failed ")
    finally:
        await store.aclose()


async def test_what_is_written_is_read(store: RedisStore, server: RedisServer) -> None:
    """By others too, under a key of our own."""
    assert await store.read(HOST) is None
    wanted = in_seconds()
    await store.write(HOST, wanted)
    assert await store.read(HOST) == pytest.approx(wanted, abs=2e-3)
    assert await store.read("another.host") is None
    assert await server.ask("KEYS", "*") == [KEY.encode()]


async def test_it_expires_by_itself(store: RedisStore, server: RedisServer) -> None:
    """When it ends. What has ended already is not written."""
    await store.write(HOST, in_seconds(100.0))
    left = await server.ask("PTTL", KEY)
    assert isinstance(left, int)
    assert 90_000 < left <= 100_001
    await store.write("another.host", in_seconds(-1.0))
    assert await store.read("another.host") is None


async def test_a_probe_writes_and_leaves_nothing_to_read(
    store: RedisStore, server: RedisServer
) -> None:
    """Its key expires soon, and is no host's."""
    await store.probe(HOST)
    assert await store.read(HOST) is None
    [key] = await server.ask("KEYS", "*")  # type: ignore[misc]
    assert key.startswith(b"xai_pool_patch:probe:")
    left = await server.ask("PTTL", key.decode())
    assert isinstance(left, int)
    assert 0 < left <= 10_000


async def test_a_unix_socket(server: RedisServer) -> None:
    """The same store by another URL."""
    store = store_from(f"unix://{server.socket_path}?db=0")
    try:
        await store.write(HOST, in_seconds())
        assert await store.read(HOST) is not None
    finally:
        await store.aclose()


@pytest.mark.parametrize("options", ["decode_responses=True", "protocol=3", "protocol=2"])
async def test_options_in_the_url(server: RedisServer, options: str) -> None:
    """Those of the client; the answers may be text or bytes."""
    store = store_from(f"{server.url}?{options}")
    try:
        await store.probe(HOST)
        await store.write(HOST, in_seconds())
        assert await store.read(HOST) is not None
    finally:
        await store.aclose()


async def test_one_connection(store: RedisStore, server: RedisServer) -> None:
    """However often it is asked; none after `aclose()`, and after that it works again."""
    for _ in range(10):
        await store.read(HOST)
    assert await server.connections() == 1
    await store.aclose()
    await store.aclose()
    while await server.connections():
        await asyncio.sleep(0.01)
    await store.read(HOST)
    assert await server.connections() == 1


async def test_several_event_loops(store: RedisStore, server: RedisServer) -> None:
    """They share the connection. One that closes it disturbs no other."""
    errors: list[BaseException] = []

    async def other() -> None:
        for _ in range(20):
            assert await store.read(HOST) is not None
            await store.aclose()

    def run() -> None:
        try:
            asyncio.run(other())
        except BaseException as error:
            errors.append(error)

    await store.write(HOST, in_seconds())
    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        assert await store.read(HOST) is not None
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert errors == []
    assert await store.read(HOST) is not None
    assert await server.connections() == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
async def test_a_process_that_was_forked(store: RedisStore, server: RedisServer) -> None:
    """It has a connection of its own: answers must not go to the other process."""
    await store.write(HOST, in_seconds())
    child = fork_that_reads(store, HOST)
    for _ in range(20):
        assert await store.read(HOST) is not None
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


async def test_the_fleet_hears_of_it(store: RedisStore, server: RedisServer) -> None:
    """A process on another machine sees it at its first look."""
    async with process(store) as refused:
        assert not refused.watch.is_lean
        refused.watch.refused(429)
        await refused.looked()
    async with process(store) as other:
        assert other.shortage.is_on
        assert other.shortage.reason == "a refusal to another process"
        assert 100.0 <= other.shortage.seconds_left <= 162.0


async def test_two_hundred_at_once(store: RedisStore, server: RedisServer) -> None:
    """All are refused in the same moment, each over a connection of its own."""
    stores = [RedisStore(server.url) for _ in range(200)]
    processes = [Process(each) for each in stores]
    try:
        for each in processes:
            each.watch.refused(429)
        for each in processes:
            await each.looked()
            assert each.watch.is_lean
        found = await store.read(HOST)
        assert found is not None
        assert 90.0 <= found - time.time() <= 132.0
        assert await server.connections() == 201
    finally:
        await asyncio.gather(*(each.aclose() for each in stores))


async def test_killed_and_restarted_empty(
    store: RedisStore, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A refusal meanwhile is left there once the server is back, and the fleet hears of it."""
    async with process(store) as refused:
        server.kill()
        refused.watch.refused(429)
        await refused.looked()
        assert logged(caplog) == ["session store failed read"]
        await server.start()
        await refused.until(lambda: len(logged(caplog)) > 1)
        assert logged(caplog)[1:] == ["session store works again"]
        async with process(RedisStore(server.url)) as other:
            assert other.shortage.is_on
            await other.watch.store.aclose()  # type: ignore[union-attr]


@pytest.mark.usefixtures("usual_timeouts")
async def test_paused(
    store: RedisStore, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It accepts connections and answers nothing. When it goes on, so does the exchange."""
    async with process(store) as refused:
        server.signal(signal.SIGSTOP)
        refused.watch.refused(429)
        await refused.looked()
        assert logged(caplog) == ["session store failed read"]
        server.signal(signal.SIGCONT)
        await refused.until(lambda: "session store works again" in logged(caplog))
        assert await store.read(HOST) is not None


@pytest.mark.parametrize("userinfo", ["", f":{PASSWORD}@"])
async def test_it_asks_for_another_password(
    tmp_path: Path, userinfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The one of the URL is in no log record."""
    async with redis_server(tmp_path, password="another") as server:
        url = f"redis://{userinfo}127.0.0.1:{server.port}/0"
        assert await is_lean_at_once(url, caplog) == "read"
    assert all(PASSWORD not in str(vars(record)) for record in caplog.records)


async def test_the_right_password(tmp_path: Path) -> None:
    """With it, the store works."""
    async with redis_server(tmp_path, PASSWORD) as server:
        store = store_from(server.url)
        await store.write(HOST, in_seconds())
        assert await store.read(HOST) is not None
        assert PASSWORD not in repr(store)
        await store.aclose()


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(["CONFIG", "SET", "maxmemory", "1"], id="full"),
        pytest.param(["REPLICAOF", "127.0.0.1", "9"], id="read-only"),
        pytest.param(["ACL", "SETUSER", "default", "-set"], id="not allowed"),
    ],
)
async def test_it_can_only_be_read(
    server: RedisServer, state: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever would be refused there could tell nobody."""
    await server.ask(*state)
    assert await is_lean_at_once(server.url, caplog) == "write"


@pytest.mark.parametrize("value", ["", "nonsense", "1", "1 2", "nan", "inf", "-inf", "1e300"])
async def test_nonsense_under_the_key(store: RedisStore, server: RedisServer, value: str) -> None:
    """It is no shortage, and the next refusal replaces it."""
    await server.ask("SET", KEY, value)
    async with process(store) as refused:
        assert not refused.watch.is_lean
        refused.watch.refused(429)
        await refused.looked()
    found = await store.read(HOST)
    assert found is not None
    assert 100.0 <= found - time.time() <= 132.0


async def test_something_else_under_the_key(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It cannot be read."""
    await server.ask("RPUSH", KEY, "a", "list")
    assert await is_lean_at_once(server.url, caplog) == "read"


NOTHING_THERE = {2: b"$-1\r\n", 3: b"_\r\n"}
"""What a Redis answers to GET, by the version of its protocol."""


async def scripted(answers: dict[bytes, bytes], otherwise: bytes) -> asyncio.Server:
    """A server that answers each command by its name, and ends the connection if it has nothing."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while otherwise and (said := await reader.read(65536)):
                for command in re.findall(rb"\*\d+\r\n\$\d+\r\n(\w+)", said):
                    writer.write(answers.get(command.upper(), otherwise))
                await writer.drain()
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"-MOVED 3999 127.0.0.1:6381\r\n", id="MOVED"),
        pytest.param(b"-ERR unknown command 'HELLO'\r\n", id="HELLO unknown"),
        pytest.param(b"-NOPERM this user has no permissions\r\n", id="NOPERM"),
        pytest.param(b"-LOADING Redis is loading the dataset in memory\r\n", id="LOADING"),
        pytest.param(b"+OK\r\n", id="always OK"),
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", id="HTTP"),
        pytest.param(bytes(range(256)) * 4, id="noise"),
        pytest.param(b"$999999999999\r\n", id="a huge length"),
        pytest.param(b"x" * 100_000, id="no line"),
        pytest.param(b"", id="nothing"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.usefixtures("usual_timeouts")
async def test_it_misbehaves_from_the_start(
    answer: bytes, protocol: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Or something else listens there."""
    listener = await scripted({}, answer)
    port = listener.sockets[0].getsockname()[1]
    async with listener:
        await is_lean_at_once(f"redis://127.0.0.1:{port}/0?protocol={protocol}", caplog)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"-READONLY You can't write against a read only replica.\r\n", id="READONLY"),
        pytest.param(b"-OOM command not allowed when used memory > 'maxmemory'.\r\n", id="OOM"),
        pytest.param(b"-NOPERM this user has no permissions\r\n", id="NOPERM"),
        pytest.param(b"+OK\r\n", id="forgotten"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.usefixtures("usual_timeouts")
async def test_only_writing_misbehaves(
    answer: bytes, protocol: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It greets, and GET finds nothing."""
    answers = {
        b"HELLO": b"%1\r\n+proto\r\n:3\r\n",
        b"CLIENT": b"+OK\r\n",
        b"GET": NOTHING_THERE[protocol],
    }
    listener = await scripted(answers, answer)
    port = listener.sockets[0].getsockname()[1]
    async with listener:
        url = f"redis://127.0.0.1:{port}/0?protocol={protocol}"
        assert await is_lean_at_once(url, caplog) == "write"


@pytest.mark.usefixtures("usual_timeouts")
@pytest.mark.parametrize("is_silent", [True, False])
async def test_one_attempt_within_a_second(is_silent: bool) -> None:
    """The client gives up by itself, and leaves the next attempt to the backoff."""
    attempts = 0
    ended = asyncio.Event()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1
        if is_silent:
            await ended.wait()
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with listener:
        store = RedisStore(f"redis://127.0.0.1:{port}/0")
        with pytest.raises((redis.TimeoutError, redis.ConnectionError)):
            await asyncio.wait_for(store.read(HOST), 30)
        assert attempts == 1
        await store.aclose()
        ended.set()


async def test_nobody_listens(unused_tcp_port: int, caplog: pytest.LogCaptureFixture) -> None:
    """Refused at once."""
    url = f"redis://127.0.0.1:{unused_tcp_port}/0"
    assert await is_lean_at_once(url, caplog) == "read"


async def test_tls(server: RedisServer, tmp_path: Path) -> None:
    """Behind a proxy that ends TLS, with a CA of its own."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = proxy.sockets[0].getsockname()[1]
    async with proxy:
        store = store_from(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={tmp_path}/ca.pem")
        await store.write(HOST, in_seconds())
        assert await store.read(HOST) is not None
        await store.aclose()


@pytest.mark.usefixtures("usual_timeouts")
async def test_no_tls_there(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A `rediss://` URL of a server without TLS."""
    assert await is_lean_at_once(f"rediss://127.0.0.1:{server.port}/0", caplog) == "read"


WRONG = [
    "",
    "redis",
    "memcached://host",
    f"http://:{PASSWORD}@host",
    f"redis//:{PASSWORD}@host",
    f"redis://:{PASSWORD}@host:port/0",
    f"redis://:{PASSWORD}@host:99999999/0",
    f"redis://:{PASSWORD}@[host/0",
    f"redis://:{PASSWORD}/#@host/0",
    f"redis://:{PASSWORD}@host/0?unknown={PASSWORD}",
    f"redis://:{PASSWORD}@host/0?protocol={PASSWORD}",
    f"redis://:{PASSWORD}@host/0?socket_timeout={PASSWORD}",
]


@pytest.mark.parametrize("url", WRONG)
def test_a_url_that_is_wrong(url: str) -> None:
    """Said when the option is given, not when the first caller is refused; without the password."""
    with pytest.raises(InvalidOptionError, match=r"^THE_VARIABLE ") as caught:
        store_from(url, "THE_VARIABLE")
    error: BaseException | None = caught.value
    assert "redis://" in str(error)
    while error is not None:
        assert PASSWORD not in "".join(map(str, error.args))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_no_url() -> None:
    """The machine's file."""
    assert isinstance(store_from(None), MachineStore)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(
        InvalidOptionError, match=r"^redis_url .*pip install 'xai_pool_patch\[redis\]'"
    ):
        store_from("redis://localhost")


def test_it_is_imported_only_where_there_is_one() -> None:
    """And then when the store is made, not at the first look, which an event loop waits for."""
    code = """
import sys
from xai_pool_patch.sessions import store_from
store_from(None)
assert "redis" not in sys.modules
store_from("redis://localhost")
assert "redis" in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
