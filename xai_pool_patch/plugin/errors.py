"""What the plugin makes of a refused handshake."""

from __future__ import annotations

import aiohttp
import yarl
from livekit.agents import APIStatusError
from multidict import CIMultiDict, CIMultiDictProxy


def with_status(error: BaseException) -> BaseException:
    """Convert the error of a refused handshake to one that the plugin reports with its status.

    From 1.8.0 on the plugin's connect raises an `APIStatusError`. The plugin's stream takes that
    for a failed connection, drops the status and retries. Before 1.8.0 the connect raises aiohttp's
    error, which holds the headers of the request: printing that error prints the API key.
    """
    if isinstance(error, APIStatusError) and 400 <= error.status_code < 500:
        status = error.status_code
    elif isinstance(error, aiohttp.ClientResponseError):
        status = error.status
    else:
        return error
    url = yarl.URL()
    request = aiohttp.RequestInfo(url, "GET", CIMultiDictProxy(CIMultiDict()), url)
    return aiohttp.ClientResponseError(request, (), status=status, message=error.message)
