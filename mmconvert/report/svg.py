"""A drawing: shapes and words at places, as SVG text. Every word is escaped here."""

from __future__ import annotations

from html import escape

from mmconvert.report.style import SVG_STYLE
from mmconvert.words import printable

CHARACTER = 7.3  # pixels that a character of 12px takes at most on average; fonts differ

STRIPE = 6  # pixels from one stripe to the next


def width_of(words: str) -> float:
    """Pixels that words of 12px take, about, and rather too many."""
    return len(words) * CHARACTER


def safe(words: str) -> str:
    """Words for SVG and HTML: nothing in them is markup or a control character."""
    return escape(printable(words))


class Drawing:
    """Collects shapes; grows as they are added."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self.width = 0.0
        self.height = 0.0

    def _reach(self, x: float, y: float) -> None:
        self.width, self.height = max(self.width, x), max(self.height, y)

    def rect(
        self, x: float, y: float, width: float, height: float, css: str, hint: str = ""
    ) -> None:
        """A rectangle; ``hint`` shows when a pointer rests on it."""
        inner = f"<title>{safe(hint)}</title>" if hint else ""
        self._parts.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" rx="2" '
            f'class="{css}">{inner}</rect>'
        )
        self._reach(x + width, y + height)

    def text(self, x: float, y: float, words: str, css: str = "ink", anchor: str = "start") -> None:
        """Words whose baseline begins (or has its middle or end) at a place."""
        words = printable(words)
        where = f' text-anchor="{anchor}"' if anchor != "start" else ""
        self._parts.append(
            f'<text x="{_n(x)}" y="{_n(y)}" class="{css}"{where}>{escape(words)}</text>'
        )
        share = {"start": 1.0, "middle": 0.5, "end": 0.0}[anchor]
        self._reach(x + share * width_of(words), y + 4)

    def line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A thin straight line."""
        self._parts.append(
            f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" class="rule"/>'
        )
        self._reach(max(x1, x2), max(y1, y2))

    def stripes(self, x: float, y: float, width: float, height: float) -> None:
        """Slanted stripes of the ground's colour over a rectangle, none of them outside it."""
        lines: list[str] = []
        for start in range(STRIPE, int(width + height), STRIPE):
            right, low = min(start, width), min(start, height)
            lines.append(
                f"M{_n(x + right)} {_n(y + start - right)}L{_n(x + start - low)} {_n(y + low)}"
            )
        if lines:
            self._parts.append(f'<path d="{"".join(lines)}" class="stripe"/>')

    def embedded(self, label: str, css: str = "") -> str:
        """For an HTML page, whose style sheet holds SVG_STYLE."""
        kind = f' class="{css}"' if css else ""
        return f"<svg{kind}{self._head(label)}>{''.join(self._parts)}</svg>"

    def standalone(self, label: str) -> str:
        """A file of its own, with its ground and its style."""
        width, height = _n(self.width), _n(self.height)
        ground = f'<rect width="{width}" height="{height}" class="ground"/>'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg"{self._head(label)}>'
            f"<style>{SVG_STYLE}</style>{ground}\n" + "\n".join(self._parts) + "\n</svg>\n"
        )

    def _head(self, label: str) -> str:
        width, height = _n(self.width), _n(self.height)
        return (
            f' width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{safe(label)}"'
        )


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
