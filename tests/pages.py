"""The report's page as its reader sees it, and what it draws."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from run_folders import PNG

from maelab.report import pieces, report


class Drawing(NamedTuple):
    """A picture that the page shows: the name of its file, the function that draws it, and what that is given."""

    name: str
    how: Callable[..., None]
    arguments: tuple[Any, ...]


def note_drawings(monkeypatch: pytest.MonkeyPatch) -> list[Drawing]:
    """Let pages be made without drawing: a point stands for each picture, and the list says what it would show."""
    noted: list[Drawing] = []

    def drawn(folder: Path, name: str, draw: Callable[..., None], *arguments: Any) -> tuple[Path, Path]:
        noted.append(Drawing(name, draw, arguments))
        files = folder / f"{name}.png", folder / f"{name}-dark.png"
        for file in files:
            file.write_bytes(PNG)
        return files

    monkeypatch.setattr(pieces, "drawn", drawn)
    return noted


class Page(HTMLParser):
    """Visible text, every address that the page names, and its tables: (caption, head, rows of cells)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.tables: list[tuple[str, list[str], list[list[str]]]] = []
        self._inside, self._caption = "", ""
        self.feed(page)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._inside == "figcaption":
            self._caption += data
        elif self._inside == "th":
            self.tables[-1][1][-1] += data
        elif self._inside == "td":
            self.tables[-1][2][-1][-1] += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "figcaption":
            self._caption = ""
        elif tag == "table":
            self.tables.append((self._caption, [], []))
        elif tag == "th":
            self.tables[-1][1].append("")
        elif tag == "tr" and self.tables and len(self.tables[-1][1]):
            self.tables[-1][2].append([])
        elif tag == "td":
            self.tables[-1][2][-1].append("")
        self._inside = tag if tag in ("figcaption", "th", "td") else self._inside

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside

    def table(self, caption: str) -> list[dict[str, str]]:
        """The rows of the table whose caption begins so: head -> cell. Of columns with one name the last counts."""
        (found,) = [(head, rows) for said, head, rows in self.tables if said.startswith(caption)]
        return [dict(zip(found[0], row, strict=True)) for row in found[1]]

    def rows(self, caption: str) -> list[list[str]]:
        """The same as lists."""
        (found,) = [rows for said, _, rows in self.tables if said.startswith(caption)]
        return found


def page(folder: Path, out: Path) -> Page:
    """The page of everything in a folder."""
    report([folder], out=out)
    return Page(out.read_text())
