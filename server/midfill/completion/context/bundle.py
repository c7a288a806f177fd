"""Types that the modules of this package share: pieces of other files, and where they come from.

A leaf: imports nothing of this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

MAX_CHUNK_LINES = 16
"""The most lines of one chunk of a file."""


class ContextSource(StrEnum):
    """The source of a snippet. The values are those of the setting `context`."""

    IMPORTS = "imports"
    OPEN = "open"
    REPOSITORY = "repository"
    EDITS = "edits"


@dataclass(frozen=True, slots=True)
class Folder:
    """A workspace folder. `prefix` is put before the paths of its files; "" for the first folder."""

    prefix: str
    path: Path


@dataclass(frozen=True, slots=True)
class Snippet:
    """A piece of another file.

    Attributes:
        path: relative to the workspace folder, with slashes; the name alone for a document outside of it.
        text: whole lines, without the terminator of the last one.
    """

    source: ContextSource
    path: str
    text: str


@dataclass(frozen=True, slots=True)
class ContextBundle:
    """The context for one document.

    Attributes:
        snippets: the most relevant last.
        path: path of the document itself, as in `Snippet`.
        repository: name of the first workspace folder, or "".
    """

    snippets: tuple[Snippet, ...] = ()
    path: str = ""
    repository: str = ""


EMPTY_BUNDLE = ContextBundle()
