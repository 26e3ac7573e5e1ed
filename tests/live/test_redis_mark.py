"""S3, S6: the fleet's mark, with a real server that is killed, paused, and refuses."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import redis
import trustme

from tests.live.redis_kit import RedisServer, redis_server
from xai_pool_patch.errors import InvalidOptionError
from xai_pool_patch.mark import Mark, MarkStore
from xai_pool_patch.sessions.limit import SessionLimit, SharedMarks, digest_of
from xai_pool_patch.sessions.machine import MachineStore
from xai_pool_patch.sessions.redis import RedisStore, store_from

pytestmark = pytest.mark.real_time

DIGEST = digest_of("xai-test-key")
KEY = f"xai_pool_patch:limit:{DIGEST}"
PASSWORD = "hunter2hunter2"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test machine that is busy must not look like a Redis that is slow."""
    monkeypatch.setattr("xai_pool_patch.sessions.limit.TIMEOUT", 60.0)
    monkeypatch.setattr("xai_pool_patch.sessions.redis.TIMEOUT", 30.0)


@pytest.fixture
def usual_timeouts(patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a Redis that never answers."""
    monkeypatch.setattr("xai_pool_patch.sessions.limit.TIMEOUT", 1.0)
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


def mark(seconds: float = 100.0, length: float = 120.0) -> Mark:
    return Mark(time.time() + seconds, length)


def close_to(wanted: Mark) -> Mark:
    return Mark(pytest.approx(wanted.until, abs=2e-3), pytest.approx(wanted.length, abs=2e-3))


class Process:
    """What one process knows and asks."""

    def __init__(self, *stores: MarkStore) -> None:
        self.limit = SessionLimit()
        self.marks = SharedMarks(DIGEST, self.limit, stores)

    async def refused(self) -> Mark:
        own = self.limit.refused()
        assert own is not None
        await self.marks.publish(own)
        return own

    async def look(self) -> None:
        await self.marks.look()

    async def look_until(self, seen: Callable[[], bool]) -> None:
        """As `PoolManager` does while something idles."""
        while not seen():
            await self.look()
            await asyncio.sleep(0.05)


def logged(caplog: pytest.LogCaptureFixture) -> Counter[str]:
    return Counter(
        f"{r.message}: {r.xai_pool_operation}"  # type: ignore[attr-defined]
        for r in caplog.records
        if r.message.startswith("mark store")
    )


FAILED = Counter({"mark store failed: read": 1, "mark store failed: write": 1})


async def fails_open(url: str, caplog: pytest.LogCaptureFixture) -> Process:
    """Nothing is raised, it takes two seconds at most of nobody's time, and is logged once."""
    store = RedisStore(url)
    try:
        process = Process(store)
        await process.refused()
        assert process.limit.is_reached
        assert process.limit.source == "this process"
        for _ in range(3):
            await process.look()
        assert logged(caplog) == FAILED
        return process
    finally:
        await store.aclose()


async def test_what_is_written_is_read(store: RedisStore, server: RedisServer) -> None:
    """By others too, under a key of our own that has no API key in it."""
    assert await store.read(DIGEST) is None
    wanted = mark()
    await store.write(DIGEST, wanted)
    assert await store.read(DIGEST) == close_to(wanted)
    assert await store.read(digest_of("another")) is None
    assert await server.ask("KEYS", "*") == [KEY.encode()]


async def test_it_expires_by_itself(store: RedisStore, server: RedisServer) -> None:
    """Five minutes after its end, since one that recurs within these is twice as long."""
    await store.write(DIGEST, mark(100.0))
    left = await server.ask("PTTL", KEY)
    assert isinstance(left, int)
    assert 390_000 < left <= 400_001
    await store.write(DIGEST, mark(-301.0))
    assert await store.read(DIGEST) is not None, "what has expired already is not written"


async def test_a_unix_socket(server: RedisServer) -> None:
    """The same store by another URL."""
    store = store_from(f"unix://{server.socket_path}?db=0")
    try:
        wanted = mark()
        await store.write(DIGEST, wanted)
        assert await store.read(DIGEST) == close_to(wanted)
    finally:
        await store.aclose()


async def test_options_in_the_url(server: RedisServer) -> None:
    """Those of the client; the answers may be text or bytes."""
    store = store_from(f"{server.url}?decode_responses=True&protocol=3")
    try:
        await store.write(DIGEST, mark())
        assert await store.read(DIGEST) is not None
    finally:
        await store.aclose()


async def test_one_connection(store: RedisStore, server: RedisServer) -> None:
    """However often it is asked; none after `aclose()`, and after that it works again."""
    for _ in range(10):
        await store.read(DIGEST)
    assert await server.connections() == 1
    await store.aclose()
    await store.aclose()
    while await server.connections():
        await asyncio.sleep(0.01)
    await store.read(DIGEST)
    assert await server.connections() == 1


def test_several_event_loops(tmp_path: Path) -> None:
    """Each has a connection of its own, and closes its own alone."""
    errors: list[BaseException] = []

    async def other(store: RedisStore, ready: threading.Barrier) -> None:
        try:
            assert await store.read(DIGEST) is not None
            await asyncio.to_thread(ready.wait)
        finally:
            await store.aclose()

    def run(store: RedisStore, ready: threading.Barrier) -> None:
        try:
            asyncio.run(other(store, ready))
        except BaseException as error:
            errors.append(error)

    async def main() -> None:
        async with redis_server(tmp_path) as server:
            store, ready = RedisStore(server.url), threading.Barrier(4, timeout=30)
            await store.write(DIGEST, mark())
            threads = [threading.Thread(target=run, args=(store, ready)) for _ in range(3)]
            for thread in threads:
                thread.start()
            await asyncio.to_thread(ready.wait)
            for thread in threads:
                await asyncio.to_thread(thread.join)
            assert errors == []
            assert await store.read(DIGEST) is not None
            assert await server.connections() == 1
            await store.aclose()

    asyncio.run(main())


async def test_the_fleet_hears_of_it(store: RedisStore, server: RedisServer) -> None:
    """A process on another machine sees the mark at its first look."""
    refused, other = Process(store), Process(store)
    own = await refused.refused()
    await other.look()
    assert (other.limit.is_reached, other.limit.source) == (True, "redis")
    assert own.length - 5 <= other.limit.seconds_left <= 1.25 * own.length


async def test_two_hundred_at_once(store: RedisStore, server: RedisServer) -> None:
    """All are refused in the same moment, after a mark that has ended: it doubles once."""
    await store.write(DIGEST, mark(-60.0, 120.0))
    stores = [RedisStore(server.url) for _ in range(200)]
    processes = [Process(each) for each in stores]
    try:
        await asyncio.gather(*(process.refused() for process in processes))
        found = await store.read(DIGEST)
        assert found is not None
        assert found.length == pytest.approx(240.0)
        assert await server.connections() == 201
        await asyncio.sleep(1.6)
        await asyncio.gather(*(process.look() for process in processes))
        assert min(process.limit.seconds_left for process in processes) >= 200.0
    finally:
        await asyncio.gather(*(each.aclose() for each in stores))


async def test_killed_and_restarted_empty(
    store: RedisStore, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A mark made meanwhile is left there once the server is back, and the fleet hears of it."""
    process = Process(store)
    await process.look()
    server.kill()
    await process.refused()
    assert process.limit.is_reached
    assert logged(caplog) == FAILED
    await server.start()
    await process.look_until(lambda: "mark store works again: write" in logged(caplog))
    other = Process(store)
    await other.look()
    assert other.limit.is_reached


async def test_killed_with_a_machines_mark(
    store: RedisStore, server: RedisServer, tmp_path: Path
) -> None:
    """The machine's mark goes on serving."""
    server.kill()
    machine = MachineStore(tmp_path / "marks")
    refused, neighbour = Process(machine, store), Process(machine, store)
    await refused.refused()
    await neighbour.look()
    assert (neighbour.limit.is_reached, neighbour.limit.source) == (True, "machine")


@pytest.mark.usefixtures("usual_timeouts")
async def test_paused(
    store: RedisStore, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It accepts connections and answers nothing. When it goes on, so does the exchange."""
    process = Process(store)
    await process.look()
    server.signal(signal.SIGSTOP)
    await process.refused()
    assert logged(caplog) == FAILED
    server.signal(signal.SIGCONT)
    await process.look_until(lambda: "mark store works again: write" in logged(caplog))
    other = Process(store)
    await other.look()
    assert other.limit.is_reached


@pytest.mark.parametrize("userinfo", ["", f":{PASSWORD}@"])
async def test_it_asks_for_another_password(
    tmp_path: Path, userinfo: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The one of the URL is in no log record."""
    async with redis_server(tmp_path, password="another") as server:
        await fails_open(f"redis://{userinfo}127.0.0.1:{server.port}/0", caplog)
    assert all(PASSWORD not in str(vars(record)) for record in caplog.records)


async def test_the_right_password(tmp_path: Path) -> None:
    """With it, the store works."""
    async with redis_server(tmp_path, PASSWORD) as server:
        store = store_from(server.url)
        await store.write(DIGEST, mark())
        assert await store.read(DIGEST) is not None
        assert PASSWORD not in repr(store)
        await store.aclose()


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(["CONFIG", "SET", "maxmemory", "1"], id="full"),
        pytest.param(["REPLICAOF", "127.0.0.1", "9"], id="read-only"),
    ],
)
async def test_it_takes_no_mark(
    store: RedisStore, server: RedisServer, state: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A server that is full, or a replica: it can be read, and writing it is logged once."""
    await server.ask(*state)
    process = Process(store)
    await process.refused()
    await process.look()
    assert process.limit.is_reached
    assert logged(caplog) == Counter({"mark store failed: write": 1})


@pytest.mark.parametrize("value", ["", "nonsense", "1", "1 2 3", "nan nan", "inf 1", "1e300 1e300"])
async def test_nonsense_under_the_key(store: RedisStore, server: RedisServer, value: str) -> None:
    """It marks nothing, and the next mark replaces it."""
    await server.ask("SET", KEY, value)
    process = Process(store)
    await process.look()
    assert not process.limit.is_reached
    own = await process.refused()
    assert await store.read(DIGEST) == close_to(own)


async def test_something_else_under_the_key(store: RedisStore, server: RedisServer) -> None:
    """The next mark replaces it."""
    await server.ask("RPUSH", KEY, "a", "list")
    process = Process(store)
    await process.look()
    assert not process.limit.is_reached
    own = await process.refused()
    assert await store.read(DIGEST) == close_to(own)


NONSENSE = {
    "HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "noise": bytes(range(256)) * 4,
    "a huge length": b"$999999999999\r\n",
    "no line": b"x" * 100_000,
    "nothing": b"",
}


@pytest.mark.parametrize("answer", NONSENSE)
@pytest.mark.usefixtures("usual_timeouts")
async def test_it_answers_nonsense(answer: str, caplog: pytest.LogCaptureFixture) -> None:
    """Something else listens there; with "nothing", it closes each connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while NONSENSE[answer] and await reader.read(65536):
                writer.write(NONSENSE[answer])
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with listener:
        await fails_open(f"redis://127.0.0.1:{port}/0", caplog)


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
            await asyncio.wait_for(store.read(DIGEST), 30)
        assert attempts == 1
        await store.aclose()
        ended.set()


async def test_nobody_listens(unused_tcp_port: int, caplog: pytest.LogCaptureFixture) -> None:
    """Refused at once."""
    await fails_open(f"redis://127.0.0.1:{unused_tcp_port}/0", caplog)


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
        await store.write(DIGEST, mark())
        assert await store.read(DIGEST) is not None
        await store.aclose()


@pytest.mark.usefixtures("usual_timeouts")
async def test_no_tls_there(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A `rediss://` URL of a server without TLS."""
    await fails_open(f"rediss://127.0.0.1:{server.port}/0", caplog)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loop_that_is_closed_without_a_word(tmp_path: Path) -> None:
    """The store works in the next loop. asyncio's warning of an unclosed socket is not ours."""

    async def main(store: RedisStore) -> None:
        await store.write(DIGEST, mark())
        assert await store.read(DIGEST) is not None

    server = RedisServer(tmp_path)
    try:
        asyncio.run(server.start())
        store = RedisStore(server.url)
        for _ in range(2):
            loop = asyncio.new_event_loop()
            loop.run_until_complete(main(store))
            loop.close()
        del loop
        gc.collect()
    finally:
        server.close()


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
    with pytest.raises(InvalidOptionError) as caught:
        store_from(url)
    error: BaseException | None = caught.value
    assert "redis://" in str(error)
    while error is not None:
        assert PASSWORD not in "".join(map(str, error.args))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


class Own:
    """What an operator may pass."""

    name = "own"
    interval: object = 1

    async def read(self, digest: str) -> Mark | None: ...

    async def write(self, digest: str, mark: Mark) -> None: ...

    async def aclose(self) -> None: ...


def test_a_store_of_the_operators_own() -> None:
    """It is taken as it is."""
    own = Own()
    assert store_from(own) is own


@pytest.mark.parametrize("spec", [None, 17, b"redis://host", object()])
def test_neither_a_url_nor_a_store(spec: object) -> None:
    """Whatever it is, it is an invalid option, and the error says what is missing."""
    with pytest.raises(InvalidOptionError, match=r"redis://.* no name, interval, read, write, acl"):
        store_from(spec)  # type: ignore[arg-type]


@pytest.mark.parametrize("interval", [0, -1.0, float("nan"), float("inf"), "1", None, True])
def test_an_interval_that_makes_no_sense(interval: object) -> None:
    """It would be asked at every look, or never."""
    own = Own()
    own.interval = interval
    with pytest.raises(InvalidOptionError, match="interval"):
        store_from(own)  # type: ignore[arg-type]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(InvalidOptionError, match=r"pip install 'xai_pool_patch\[redis\]'"):
        store_from("redis://localhost")


def test_it_is_imported_late() -> None:
    """Applications without a Redis need neither the package nor the time that its import takes."""
    code = "import sys, xai_pool_patch.sessions.redis; sys.exit('redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
