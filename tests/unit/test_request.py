"""K1: the key of a pool is what a TTS would ask aiohttp for."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from tests.clock import in_virtual_time
from xai_pool_patch.protocol.request import Request

URL = "wss://api.x.ai/v1/tts?voice=ara"
SECRET = "xai-secret"


class Session:
    """Equal to every other, as a wrapper of the application may be."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Session)

    def __hash__(self) -> int:
        return 1

    async def ws_connect(self, *args: Any, **kwargs: Any) -> str:
        self.asked.append((args, kwargs))
        return "socket"


SESSION: Any = Session()


def request(
    url: Any = URL,
    session: Any = SESSION,
    max_age: float = math.inf,
    owner: object = None,
    **kw: Any,
) -> Request:
    kwargs = {"headers": {"Authorization": f"Bearer {SECRET}"}, "heartbeat": 30.0, **kw}
    return Request(session, (url,), kwargs, max_age=max_age, owner=owner)


def test_the_same_arguments_are_the_same_key() -> None:
    """Each TTS makes its own, with the same contents."""
    assert request() == request()
    assert hash(request()) == hash(request())
    assert len({request(), request()}) == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda: request(URL + "x"),
        lambda: request(session=Session()),
        lambda: request(max_age=60.0),
        lambda: request(owner=object()),
        lambda: request(headers={"Authorization": "Bearer other"}),
        lambda: request(ssl=False),
        lambda: request(heartbeat=20.0),
    ],
)
def test_any_other_argument_is_another_key(other: Any) -> None:
    """Sessions and owners count by identity, not as they compare."""
    assert request() != other()


def test_it_is_equal_to_nothing_else() -> None:
    assert request() != "request"


def test_what_the_application_changes_later_does_not_change_the_key() -> None:
    """A dict of headers may be shared, and changed in place for a new API key."""
    headers, protocols = {"Authorization": "Bearer old"}, ["a"]
    key = request(headers=headers, protocols=protocols)
    before = hash(key)
    headers["Authorization"] = "Bearer new"
    protocols.append("b")
    assert hash(key) == before
    assert key == request(headers={"Authorization": "Bearer old"}, protocols=["a"])
    assert key != request(headers=headers, protocols=protocols)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        (URL, "api.x.ai:443"),
        ("ws://127.0.0.1:8080/tts", "127.0.0.1:8080"),
        ("wss://api.x.ai:8443/v1/tts", "api.x.ai:8443"),
    ],
)
def test_the_host_has_its_port(url: str, host: str) -> None:
    """Two servers of one machine are two hosts."""
    assert request(url).host == host


def test_repr_shows_no_secret() -> None:
    """Nor the voice, which may be a customer's own."""
    assert repr(request()) == "<Request>"


@pytest.mark.parametrize("arguments", [(), (17,), (None,)])
def test_without_a_url_there_is_no_key(arguments: tuple[Any, ...]) -> None:
    with pytest.raises((TypeError, ValueError, IndexError)):
        Request(SESSION, arguments, {}, max_age=math.inf)


def test_arguments_that_cannot_be_compared_make_no_key() -> None:
    """Nobody could say whether two connections are alike."""
    with pytest.raises(TypeError):
        request(params={"a": {1, 2}})


@in_virtual_time
async def test_it_connects_with_its_arguments_and_reads_pings_itself() -> None:
    """Whatever the application says about that."""
    session: Any = Session()
    key = request(session=session, autoping=True)
    assert await key.connect(1.0) == "socket"  # type: ignore[comparison-overlap]
    [(args, kwargs)] = session.asked
    assert args == (URL,)
    assert kwargs.pop("autoping") is False
    assert kwargs == {"headers": {"Authorization": f"Bearer {SECRET}"}, "heartbeat": 30.0}


@in_virtual_time
async def test_a_dial_has_a_timeout() -> None:
    class Hangs(Session):
        async def ws_connect(self, *args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(1e9)

    assert isinstance(await request(session=Hangs()).connect(1.0), asyncio.TimeoutError)
