"""The loss curve as a picture (SVG), drawn without a library."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 30, 45
COLOURS = ("#1f6fb4", "#d1495b")

Series = Sequence[tuple[int, float]]


def draw(title: str, lines: dict[str, Series]) -> str:
    """An SVG of one or two lines over iterations.

    Args:
        lines: name -> (iteration, loss) pairs; empty ones are left out.
    """
    shown = {name: list(points) for name, points in lines.items() if points}
    points = [p for some in shown.values() for p in some]
    if not points:
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"/>\n'
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = floor(min(y for _, y in points)), ceil(max(y for _, y in points))
    high = max(high, low + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / max(1, last - first)
        up = (y - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (
            HEIGHT - TOP - BOTTOM
        )

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>',
    ]
    for i in range(5):
        y = low + (high - low) * i / 4
        x = first + (last - first) * i / 4
        (left, height), (across, _) = at(first, y), at(x, low)
        out.append(
            f'<line x1="{left:.1f}" y1="{height:.1f}" x2="{WIDTH - RIGHT}" y2="{height:.1f}" '
            'stroke="#ddd"/>'
            f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{y:g}</text>'
            f'<text x="{across:.1f}" y="{HEIGHT - 22}" text-anchor="middle">{round(x)}</text>'
        )
    out.append(f'<text x="{WIDTH // 2}" y="{HEIGHT - 6}" text-anchor="middle">iteration</text>')
    for number, (name, some) in enumerate(shown.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in some))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        out.append(
            f'<text x="{WIDTH - RIGHT - 4}" y="{TOP + 16 * number + 4}" fill="{colour}" '
            f'text-anchor="end">{escape(name)}</text>'
        )
    return "\n".join([*out, "</svg>", ""])
