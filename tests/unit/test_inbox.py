"""What the plugin has not received yet, in order, with one reader."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.clock import in_virtual_time
from xai_pool_patch.protocol.inbox import Inbox


@in_virtual_time
async def test_what_came_before_is_received_in_order_without_waiting() -> None:
    inbox: Any = Inbox()
    for number in range(3):
        inbox.put(number)
    assert len(inbox) == 3
    for number in range(3):
        with pytest.raises(StopIteration) as received:
            inbox.get().send(None)
        assert received.value.value == number
    assert not inbox


@in_virtual_time
async def test_a_reader_waits_for_the_next() -> None:
    """And what comes together is kept for later."""
    inbox: Any = Inbox()
    reading = asyncio.ensure_future(inbox.get())
    await asyncio.sleep(1.0)
    assert not reading.done()
    for number in range(3):
        inbox.put(number)
    assert [await reading, await inbox.get(), await inbox.get()] == [0, 1, 2]


@pytest.mark.parametrize("put_first", [True, False])
@in_virtual_time
async def test_a_cancelled_reader_loses_nothing(put_first: bool) -> None:
    """Whichever came first: the message or the cancellation."""
    inbox: Any = Inbox()
    reading = asyncio.ensure_future(inbox.get())
    await asyncio.sleep(0)
    if put_first:
        inbox.put("news")
    reading.cancel()
    if not put_first:
        inbox.put("news")
    await asyncio.wait([reading])
    assert reading.cancelled()
    assert await inbox.get() == "news"


@in_virtual_time
async def test_a_reader_that_times_out_loses_nothing() -> None:
    inbox: Any = Inbox()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(inbox.get(), 1.0)
    inbox.put("news")
    assert await asyncio.wait_for(inbox.get(), 1.0) == "news"
