"""The shares of a simulation as a picture: an SVG with a stacked bar for each plugin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from .calls import Outcome

COLOURS = {
    Outcome.FLOOR: "#2da44e",
    Outcome.WAITED: "#a5d6a7",
    Outcome.RETRIED: "#f2b233",
    Outcome.FAILED: "#cf222e",
}
WIDTH, MARGIN, LABELS, BAR_WIDTH = 760, 20, 100, 560
LINE, TITLE = 22, 34


@dataclass(frozen=True)
class Bar:
    """The shares of one plugin, in the order of `Outcome`."""

    name: str
    shares: Sequence[float]


def draw(sessions: int, groups: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """An SVG document.

    Args:
        sessions: of the team.
        groups: the bars, by what they have in common.
    """
    body, top = [*_legend(sessions)], 2 * TITLE + MARGIN
    for title, bars in groups:
        body.append(_text(MARGIN, top, title, "bold"))
        for number, bar in enumerate(bars):
            body += _bar(bar, top + 8 + number * LINE)
        top += len(bars) * LINE + TITLE
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}"'
        ' font-family="sans-serif" font-size="13">'
    )
    paper = f'<rect width="{WIDTH}" height="{top}" fill="white"/>'
    return "\n".join([head, paper, *body, "</svg>\n"])


def _legend(sessions: int) -> Iterator[str]:
    yield _text(MARGIN, MARGIN + 6, f"What became of the replies, {sessions} sessions", "bold")
    for number, (outcome, colour) in enumerate(COLOURS.items()):
        left = MARGIN + number * 180
        yield _rectangle(left, MARGIN + 20, 14, colour)
        yield _text(left + 20, MARGIN + 32, outcome.value)


def _bar(bar: Bar, top: float) -> Iterator[str]:
    yield _text(MARGIN + 8, top + 13, bar.name)
    left: float = MARGIN + LABELS
    for share, colour in zip(bar.shares, COLOURS.values(), strict=True):
        width = BAR_WIDTH * share
        if share > 0.0:
            yield _rectangle(left, top, width, colour)
        left += width
    failed = bar.shares[-1]
    if failed > 0.0:
        yield _text(left + 6, top + 13, f"{100.0 * failed:.2g} %")


def _rectangle(left: float, top: float, width: float, colour: str) -> str:
    return f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="16" fill="{colour}"/>'


def _text(left: float, top: float, text: str, weight: str = "normal") -> str:
    return (
        f'<text x="{left:.1f}" y="{top}" font-weight="{weight}" fill="#24292f">'
        f"{escape(text)}</text>"
    )
