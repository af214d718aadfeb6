"""What a page is made of: tiles, pictures and tables, in sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

_BESIDE = 5
"""Columns of a table that take half of a page."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A headline figure."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture, with a title that says what it shows."""

    title: str
    svg: Markup
    narrow: Markup | None = None
    """The same for a phone; then `svg` is a wide one."""
    caption: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    chip: str = ""
    """Name of a colour to stand before the text."""
    strong: bool = False
    link: str = ""
    """Id of a part of the page."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first column names the rows, the others hold figures, or words where `words` says so."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    words: bool = False
    total: bool = False
    """Whether the last row is a sum."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a run's story."""

    title: str
    notes: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()

    @property
    def small(self) -> bool:
        """Whether another one has room beside it."""
        return len(self.pictures) == 1 and not self.tables and not self.pictures[0].narrow

    @property
    def beside(self) -> bool:
        """Whether the tables have room beside the picture."""
        narrow = all(len(table.head) <= _BESIDE for table in self.tables)
        return len(self.pictures) == 1 and bool(self.tables) and narrow and not self.pictures[0].narrow


@dataclass(frozen=True, kw_only=True)
class Story:
    """All that a page says of one run."""

    key: str
    label: str
    """A letter, where there are several runs."""
    colour: str
    title: str
    subtitle: str
    sentences: Sequence[str]
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    left_out: Sequence[str] = field(default_factory=tuple)
