"""A picture of an MM layout: a cell for each rank of each stage, coloured by module."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mmconvert.formats.contents import Box, Holding
from mmconvert.report.style import WIDTHS, module_class
from mmconvert.report.svg import CHARACTER, Drawing, width_of
from mmconvert.sharding.layout import Chunk, Layout, Rank
from mmconvert.words import amount, printable

EDGE, GAP, PAD = 14, 4, 8  # pixels: around the picture, between cells, inside cells
LINE, BAR = 19, 10  # pixels: from one line of words to the next; of a bar, its height
SWATCH = 11  # pixels of a square of the legend
LONGEST = 40  # characters of a module's name; it may come from a file


class Held(NamedTuple):
    """One module in one cell."""

    holding: Holding
    words: str
    shared: list[int]  # the tp ranks of the stage that have this same part, this one included


class GridPicture:
    """Draws one layout; the parts are placed from top to bottom, cells break into lines."""

    def __init__(self, layout: Layout, boxes: Sequence[Box], width: int) -> None:
        self._layout = layout
        self._boxes: Mapping[Chunk, Box] = {b.chunk: b for b in boxes if b.chunk is not None}
        self._most = max((box.nbytes for box in boxes), default=0) or 1
        self._hetero = len(set(layout.tp.values())) > 1
        self._cells = {chunk: self._held(chunk) for chunk in self._boxes}
        self._columns = layout.tp_folders * layout.ep
        inner, least = width - 2 * EDGE, self.least_cell()
        fitting = max(1, int((inner + GAP) // (least + GAP)))
        self.lines = math.ceil(self._columns / fitting)
        self._each = math.ceil(self._columns / self.lines)  # cells of a line, all lines alike
        self._cell = max(least, (inner + GAP) / self._each - GAP)
        self._right = EDGE + inner
        self._drawing = Drawing()

    def least_cell(self) -> float:
        """Pixels that the widest words of any cell need."""
        lines = [held.words for cell in self._cells.values() for held in cell]
        lines += [f"{self._rank(c.rank)}  {amount(b.nbytes)}" for c, b in self._boxes.items()]
        return max(map(width_of, lines), default=0) + (6 if self._hetero else 3) * PAD

    def _held(self, chunk: Chunk) -> list[Held]:
        """The modules of a cell, each with its part where modules differ in tp."""
        found: list[Held] = []
        for holding in self._boxes[chunk].holdings:
            words = printable(holding.words)
            size = self._layout.tp.get(holding.module)
            if not size or not self._hetero:
                found.append(Held(holding, words, []))
                continue
            part = chunk.rank.tp % size
            ranks = list(range(part, self._layout.tp_folders, size))
            found.append(Held(holding, f"{words} · {part + 1}/{size}", ranks))
        return found

    def _rank(self, rank: Rank) -> str:
        return f"ep {rank.ep} tp {rank.tp}" if self._layout.ep > 1 else f"tp {rank.tp}"

    def draw(self, title: str) -> Drawing:
        """The whole picture."""
        self._drawing.text(EDGE, EDGE + 14, title, "ink big")
        sizes = [f"{self._layout.tp_flag(key)} {size}" for key, size in self._layout.tp.items()]
        sizes += [f"ep_size {self._layout.ep}"] * (self._layout.ep > 1)
        sizes += [f"pp_size {self._layout.pp_size}", f"vpp_size {self._layout.vpp_size}"]
        y = self._paragraph(EDGE + 36, ", ".join(sizes))
        y = self._legend(y + 6)
        for pp in range(self._layout.pp_size):
            for virtual in range(self._layout.vpp_size):
                y = self._stage(pp, virtual, y)
        for note in self._notes():
            y = self._paragraph(y + 4, note)
        self._drawing.width = max(self._drawing.width, self._right) + EDGE
        self._drawing.height += EDGE
        return self._drawing

    def _paragraph(self, y: float, words: str) -> float:
        """Words of any length, in lines; returns where the next line would be."""
        for line in textwrap.wrap(words, int((self._right - EDGE) / CHARACTER)):
            self._drawing.text(EDGE, y, line, "dim")
            y += 17
        return y

    def _legend(self, y: float) -> float:
        """A square of each module's colour with its name."""
        modules = {held.holding.module: held for cell in self._cells.values() for held in cell}
        x: float = EDGE
        for module, held in modules.items():
            word = printable(held.holding.word or module, LONGEST)
            length = SWATCH + 6 + width_of(word)
            if x > EDGE and x + length > self._right:
                x, y = EDGE, y + LINE
            css = module_class(held.holding.colour)
            self._drawing.rect(x, y - SWATCH + 1, SWATCH, SWATCH, css)
            self._drawing.text(x + SWATCH + 6, y, word, "ink")
            x += length + 16
        return y + LINE

    def _notes(self) -> Iterable[str]:
        if any(len(held.shared) > 1 for cell in self._cells.values() for held in cell):
            yield "Striped: the same part is on several tp ranks; k/n: part k of n of the module."
        elif self._hetero:
            yield "k/n: part k of n of the module."
        if self._layout.ep > 1:
            yield "Each ep rank holds its share of the experts, and a copy of all else."
        yield f"Bars: bytes, all on one scale; a full bar is {amount(self._most)}."
        yield "in, out: tensors before and after a module's layers."

    def _stage(self, pp: int, virtual: int, y: float) -> float:
        """The cells of one model chunk, below a heading; returns where the next stage begins."""
        label = f"pp {pp}" + (f", chunk {virtual}" if self._layout.vpp_size > 1 else "")
        self._drawing.text(EDGE, y + 12, label, "ink bold")
        if not virtual:
            x = EDGE + width_of(label) + 14
            self._drawing.text(x, y + 12, self._file_sizes(pp), "dim")
        y += LINE
        row = [c for c in self._boxes if c.rank.pp == pp and c.virtual == virtual]
        modules = max((len(self._cells[c]) for c in row), default=0)
        height = LINE * (modules + 1) + (BAR + PAD if modules else 0) + PAD
        for chunk in row:
            line, place = divmod(self._layout.column(chunk.rank), self._each)
            x = EDGE + place * (self._cell + GAP)
            self._draw_cell(chunk, x, y + line * (height + GAP), height)
        return y + self.lines * (height + GAP) + 8

    def _file_sizes(self, pp: int) -> str:
        """The bytes of a rank file of a pipeline rank: of all its model chunks."""
        sizes = [0] * self._columns
        for chunk, box in self._boxes.items():
            if chunk.rank.pp == pp:
                sizes[self._layout.column(chunk.rank)] += box.nbytes
        least, most = amount(min(sizes)), amount(max(sizes))
        return "rank files of " + (most if least == most else f"{least} to {most}")

    def _draw_cell(self, chunk: Chunk, x: float, y: float, height: float) -> None:
        box, inner = self._boxes[chunk], self._cell - 2 * PAD
        css = "cell" if box.nbytes else "none"
        hint = f"{box.name}: {box.nbytes:,} bytes"
        self._drawing.rect(x + 0.5, y + 0.5, self._cell - 1, height - 1, css, hint)
        self._drawing.text(x + PAD, y + LINE - 3, self._rank(chunk.rank), "dim")
        size = amount(box.nbytes) if box.nbytes else "empty"
        style = "ink bold" if box.nbytes else "dim"
        self._drawing.text(x + self._cell - PAD, y + LINE - 3, size, style, "end")
        floor = y + height - PAD - BAR
        if box.nbytes:
            self._drawing.rect(x + PAD, floor, inner, BAR, "track")
        left = x + PAD
        for number, held in enumerate(self._cells[chunk], 1):
            css, hint = module_class(held.holding.colour), _hint(held)
            top = y + LINE * number + 4
            self._drawing.rect(x + PAD, top, inner, LINE - 2, f"{css} tint", hint)
            self._drawing.text(x + PAD + 5, top + 13, held.words, "ink")
            length = inner * held.holding.nbytes / self._most
            self._drawing.rect(left, floor, length, BAR, css, hint)
            if len(held.shared) > 1:
                free = 12 + width_of(held.words)  # stripes would make the words hard to read
                self._drawing.stripes(x + PAD + free, top, inner - free, LINE - 2)
                self._drawing.stripes(left, floor, length, BAR)
            left += length


def _hint(held: Held) -> str:
    words = f"{held.words}: {held.holding.nbytes:,} bytes, {held.holding.tensors} tensors"
    if len(held.shared) > 1:
        words += f"; the same on tp ranks {', '.join(map(str, held.shared))}"
    return words


def layout_drawing(layout: Layout, boxes: Sequence[Box], title: str, width: int = 0) -> Drawing:
    """The picture of a layout; ``boxes`` are its model chunks.

    Args:
        width: pixels it may be wide; 0 takes a medium width if a stage fits on one line there,
            else a wide one.
    """
    if not width:
        medium, wide = WIDTHS["medium"], WIDTHS["wide"]
        width = medium if GridPicture(layout, boxes, medium).lines == 1 else wide
    return GridPicture(layout, boxes, width).draw(title)
