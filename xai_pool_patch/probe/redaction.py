"""What of the service's own words may be shown: nothing that could name an account."""

from __future__ import annotations

import re
from collections.abc import Mapping

_WORDS = """
a above after again all allowed already an and any api are at audio authentication bad be
been before being busy but by can cannot capacity clear client close closed concurrency
concurrent connection connections content could credits deadline delta did do does done
duplicate during empty error exceed exceeded exceeds expected expired failed field fields
for forbidden found from full generation get given had has have idle in input internal
invalid is it json key key's later length limit limited limits long many maximum message
messages minute minutes missing model more must no not nothing of on one only open or out
over parse payment per permission permit pipeline please quota rate reached refused request
requests required retry second seconds server service session sessions silence slow speak
speech spoken stream streams supported synthesis team text that the then there this time
timed timeout to too try tts type unavailable unauthorized unexpected unknown unsupported
until update upgrade utterance utterances valid value voice wait was websocket were when
while will with within without you your
"""

PLAIN_WORDS = frozenset(_WORDS.split())
"""The words of an error message that are shown. The names of a team, a user or a key are none."""

LONGEST = 160
"""Characters that are shown of an error message."""

_MARKS = ".,:;()"
_NUMBER = re.compile(r"\d{1,5}(\.\d{1,3})?m?s?")


def plain_words(message: str) -> str:
    """An error message with every word left out that is not known to be harmless."""
    kept: list[str] = []
    for token in message.split():
        shown = token if _is_plain(token.strip(_MARKS)) else "…"
        if shown != "…" or kept[-1:] != ["…"]:
            kept.append(shown)
    return " ".join(kept)[:LONGEST]


def _is_plain(word: str) -> bool:
    parts = re.split(r"[._:/-]", word.lower())
    return not word or _NUMBER.fullmatch(word) is not None or PLAIN_WORDS.issuperset(parts)


PUBLIC_HEADERS = re.compile(r"retry-after|(x-)?ratelimit-[a-z-]+", re.IGNORECASE)
_HARMLESS_VALUE = re.compile(r"[\d.]{1,12}[a-z]{0,2}")


def public_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Those of a refusal that say when to come back, if they hold a number."""
    return {
        name: value
        for name, value in headers.items()
        if PUBLIC_HEADERS.fullmatch(name) and _HARMLESS_VALUE.fullmatch(value)
    }
