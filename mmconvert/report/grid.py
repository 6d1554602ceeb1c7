"""A picture of an MM layout: pipeline ranks x ranks of a stage (ep, tp), coloured by bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmconvert.formats.contents import Box
from mmconvert.report.style import SHADES
from mmconvert.report.svg import Drawing, width_of
from mmconvert.sharding.layout import Chunk, Layout
from mmconvert.words import amount

EDGE, GAP, PAD = 20, 3, 8  # pixels: around the picture, between cells, inside cells
LINE = 16  # pixels from one line of words to the next
BAR = 150  # pixels of the longest bar of rank files


class GridPicture:
    """Draws one layout; the parts are placed from top to bottom."""

    def __init__(self, layout: Layout, boxes: Sequence[Box]) -> None:
        self._layout = layout
        self._boxes: Mapping[Chunk, Box] = {b.chunk: b for b in boxes if b.chunk is not None}
        self._most = max((box.nbytes for box in boxes), default=0)
        self._mixed = len(set(layout.tp.values())) > 1
        self._cells = {chunk: self._words(chunk) for chunk in self._boxes}
        longest = max((width_of(w) for ws in self._cells.values() for w in ws), default=0)
        self._columns = layout.tp_folders * layout.ep
        least = 200 if self._columns == 1 else 92
        self._cell = max(least, longest + 2 * PAD)
        labels = ["pp 00"] + (["chunk 0"] if layout.vpp_size > 1 else [])
        self._left = EDGE + sum(width_of(label) + 6 for label in labels)
        self._right = self._left + self._columns * (self._cell + GAP) + 12
        self._drawing = Drawing()

    def _words(self, chunk: Chunk) -> list[str]:
        """The lines of a cell: its modules, each with its part where encoders differ in tp."""
        lines: list[str] = []
        for holding in self._boxes[chunk].holdings:
            size = self._layout.tp.get(holding.module)
            part = f" · {chunk.rank.tp % size + 1}/{size}" if size and self._mixed else ""
            lines.append(holding.words + part)
        return lines

    def draw(self, title: str) -> Drawing:
        """The whole picture."""
        self._drawing.text(EDGE, EDGE + 12, title, "ink big")
        sizes = [f"{self._layout.tp_flag(key)} {size}" for key, size in self._layout.tp.items()]
        sizes += [f"ep_size {self._layout.ep}"] * (self._layout.ep > 1)
        sizes += [f"pp_size {self._layout.pp_size}", f"vpp_size {self._layout.vpp_size}"]
        self._drawing.text(EDGE, EDGE + 32, ", ".join(sizes), "dim")
        y = self._heads(EDGE + 62)
        totals = self._totals()
        for pp in range(self._layout.pp_size):
            y = self._stage(pp, y, totals) + 5
        self._legend(y + 14)
        self._drawing.width += EDGE
        self._drawing.height += EDGE - 4
        return self._drawing

    def _heads(self, y: float) -> float:
        for column in range(self._columns):
            ep, tp = divmod(column, self._layout.tp_folders)
            x = self._left + column * (self._cell + GAP) + self._cell / 2
            words = f"ep {ep} tp {tp}" if self._layout.ep > 1 else f"tp {tp}"
            self._drawing.text(x, y, words, "dim bold", "middle")
        self._drawing.text(self._right, y, "bytes of a rank file", "dim bold")
        return y + 8

    def _totals(self) -> list[tuple[int, int]]:
        """Of each pp rank the bytes of its smallest and its largest rank file."""
        found: list[tuple[int, int]] = []
        for pp in range(self._layout.pp_size):
            sizes = [0] * self._columns
            for chunk, box in self._boxes.items():
                if chunk.rank.pp == pp:
                    sizes[self._layout.column(chunk.rank)] += box.nbytes
            found.append((min(sizes), max(sizes)))
        return found

    def _stage(self, pp: int, top: float, totals: Sequence[tuple[int, int]]) -> float:
        y = top
        for virtual in range(self._layout.vpp_size):
            row = [c for c in self._boxes if c.rank.pp == pp and c.virtual == virtual]
            lines = max((len(self._cells[c]) for c in row), default=0)
            height = LINE * (max(1, lines) + 1) + PAD
            if self._layout.vpp_size > 1:
                label = f"chunk {virtual}"
                self._drawing.text(self._left - 8, y + height / 2 + 4, label, "dim", "end")
            for chunk in row:
                self._draw_cell(chunk, y, height)
            y += height + GAP
        self._drawing.text(EDGE, (top + y - GAP) / 2 + 4, f"pp {pp}", "ink bold")
        self._bar(totals, pp, (top + y - GAP) / 2)
        return y

    def _draw_cell(self, chunk: Chunk, y: float, height: float) -> None:
        x = self._left + self._layout.column(chunk.rank) * (self._cell + GAP)
        box = self._boxes[chunk]
        middle = x + self._cell / 2
        if not box.nbytes:
            self._drawing.rect(x + 0.5, y + 0.5, self._cell - 1, height - 1, "none", box.name)
            self._drawing.text(middle, y + height / 2 + 4, "empty", "dim", "middle")
            return
        shade = _shade(box.nbytes, self._most)
        hint = f"{box.name}: {', '.join(self._cells[chunk])}; {box.nbytes:,} bytes"
        self._drawing.rect(x, y, self._cell, height, f"s{shade}", hint)
        words = self._cells[chunk]
        first = y + (height - LINE * (len(words) + 1)) / 2 + 12
        for number, line in enumerate(words):
            self._drawing.text(middle, first + number * LINE, line, f"i{shade}", "middle")
        last = first + len(words) * LINE
        self._drawing.text(middle, last, amount(box.nbytes), f"i{shade} bold", "middle")

    def _bar(self, totals: Sequence[tuple[int, int]], pp: int, middle: float) -> None:
        least, largest = totals[pp]
        length = BAR * largest / (max(most for _, most in totals) or 1)
        self._drawing.rect(self._right, middle - 6, max(1, length), 12, f"s{SHADES - 2}")
        words = amount(largest) if least == largest else f"{amount(least)} to {amount(largest)}"
        self._drawing.text(self._right + length + 8, middle + 4, words)

    def _legend(self, y: float) -> None:
        words = "in, out: what stands before and after the layers"
        if self._mixed:
            words += "; k/n: part k of n of the module, each part on several tp ranks if n is less"
        if len({box.nbytes for box in self._boxes.values()}) > 1:
            self._drawing.text(EDGE, y + 10, "bytes of a cell: 0", "dim")
            x = EDGE + width_of("bytes of a cell: 0") + 4
            for shade in range(SHADES):
                self._drawing.rect(x + shade * 26, y, 25, 13, f"s{shade}")
            self._drawing.text(x + SHADES * 26 + 6, y + 10, amount(self._most), "dim")
            y += 26
        self._drawing.text(EDGE, y + 10, words, "dim")


def _shade(nbytes: int, most: int) -> int:
    """The shade of an amount: equal steps from nothing to the most."""
    return min(SHADES - 1, SHADES * nbytes // most) if most else 0


def layout_drawing(layout: Layout, boxes: Sequence[Box], title: str) -> Drawing:
    """The picture of a layout; ``boxes`` are its model chunks."""
    return GridPicture(layout, boxes).draw(title)
