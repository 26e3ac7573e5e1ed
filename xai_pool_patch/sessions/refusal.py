"""What counts as a refusal for want of a session. xAI documents no status, code or text for it."""

from __future__ import annotations

import re

import aiohttp
from aiohttp import WSCloseCode

_CLOSE_CODES = (WSCloseCode.POLICY_VIOLATION, WSCloseCode.TRY_AGAIN_LATER)

_WHAT = r"\b(?:sessions?|streams?|connections?|concurren\w+)\b"
_LIMIT = (
    r"\b(?:limit(?:s|ed)?|too\s+many|exceed\w*|max|maximum|quotas?|reached|exhausted|capacity"
    r"|no\s+more)\b"
)
_GAP = r"[^\w.;!?]+"
_NEAR = rf"(?:{_GAP}[\w-]+){{0,2}}{_GAP}"
"""At most two words in between, of the same sentence."""
_LIMIT_OF_SESSIONS = re.compile(f"{_LIMIT}{_NEAR}{_WHAT}|{_WHAT}{_NEAR}{_LIMIT}", re.IGNORECASE)
_LIMIT_OF_TEXT = re.compile(r"\b(?:characters?|bytes|words|length|duration)\b", re.IGNORECASE)
_QUOTED = re.compile("\"[^\"]*\"|“[^”]*”|`[^`]*`|(?<!\\w)'[^']*'(?!\\w)")


def is_refusal(error: BaseException) -> bool:
    """Whether the server itself refused a handshake for want of a session, or may have.

    A proxy's answer is another error of aiohttp. A 400, 401 or 404 is about the request.
    """
    status = error.status if isinstance(error, aiohttp.WSServerHandshakeError) else 0
    return status in (403, 429) or 500 <= status < 600


def says_refused(close_code: int | None = None, error_message: object = None) -> bool:
    """Whether a fresh connection's first answer says that there are too many sessions.

    Args:
        close_code: of a Close frame.
        error_message: the field `message` of an error frame, whatever it holds. What it quotes does
            not count, since that may be the spoken text.
    """
    if close_code in _CLOSE_CODES:
        return True
    said = _QUOTED.sub(" ", error_message) if isinstance(error_message, str) else ""
    return bool(_LIMIT_OF_SESSIONS.search(said)) and not _LIMIT_OF_TEXT.search(said)
