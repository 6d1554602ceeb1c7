"""An HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mmconvert.report.style import PAGE_STYLE, SVG_STYLE, WIDTHS
from mmconvert.report.svg import Drawing, safe
from mmconvert.version import VERSION


def page(title: str, parts: Sequence[str]) -> str:
    """The page; ``parts`` are HTML."""
    # The page may load nothing, so that what a checkpoint names can have no effect.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{safe(title)}</title>\n<style>{PAGE_STYLE}{SVG_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f'\n<p class="quiet">mm-convert {VERSION}</p>\n</body></html>\n'
    )


def heading(words: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{safe(words)}</h{level}>"


def paragraph(words: str, css: str = "") -> str:
    """A paragraph."""
    return f'<p class="{css}">{safe(words)}</p>' if css else f"<p>{safe(words)}</p>"


def facts(pairs: Mapping[str, str]) -> str:
    """Names with their values."""
    rows = "".join(f"<dt>{safe(k)}</dt><dd>{safe(v)}</dd>" for k, v in pairs.items() if v)
    return f"<dl>{rows}</dl>"


def bullets(items: Sequence[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{safe(item)}</li>" for item in items) + "</ul>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kinds: str) -> str:
    """A table.

    Args:
        rows: a line break in a cell begins a quieter line.
        kinds: one letter for each column: ``n`` a number, ``t`` words, ``m`` names of tensors.
    """
    css = {"n": ' class="n"', "t": "", "m": ' class="name"'}
    tops = "".join(
        f"<th{css[kind] if kind == 'n' else ''}>{safe(word)}</th>"
        for word, kind in zip(head, kinds, strict=True)
    )
    body = "\n".join(
        "<tr>"
        + "".join(
            f"<td{css[kind]}>{_cell(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{tops}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(words: str) -> str:
    first, *others = words.split("\n")
    return safe(first) + "".join(f'<br><span class="quiet">{safe(o)}</span>' for o in others)


def pictures(draw: Callable[[int], Drawing], label: str) -> str:
    """One picture drawn for each of the WIDTHS: the style sheet shows the one that fits.

    Args:
        draw: draws it so many pixels wide.
    """
    drawn = (draw(width).embedded(label, css) for css, width in WIDTHS.items())
    return f'<figure class="scroll">{"".join(drawn)}</figure>'
