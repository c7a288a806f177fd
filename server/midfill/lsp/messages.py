"""What clients say about documents and cursors, read from raw JSON.

lsprotocol's types are not used for these: they refuse what real editors send (`"range": null`, a missing
version, triggerKind 0), and a refused edit would leave the server with another text than the editor's.
They also take longer than everything else that is done for a key.

A reader takes the params of one method and raises `MalformedError` where it cannot make sense of them.
Knows nothing of pygls. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from midfill.text.documents import Change

# LSP's integers go to 2**31 - 1; whatever lies beyond means "the end".
_MAX = 2**31 - 1
_INVOKED = 1
_AUTOMATIC = 2


# What midfill's own clients call themselves: the demo's, the evaluations', the benchmarks'.
OWN_CLIENT = "midfill"


class MalformedError(ValueError):
    """Params that cannot be read."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A document that was opened, with its whole text."""

    uri: str
    language_id: str
    version: int
    text: str


@dataclass(frozen=True, slots=True)
class Edited:
    """Changes of one document, in order. `version` is None if the client did not say."""

    uri: str
    version: int | None
    changes: list[Change]


@dataclass(frozen=True, slots=True)
class NotebookOpened:
    """A notebook: the URIs of its cells in order, and the cells' texts."""

    uri: str
    cells: list[str]
    texts: list[Opened]


@dataclass(frozen=True, slots=True)
class NotebookChanged:
    """What changed in a notebook, to be applied from top to bottom.

    Attributes:
        splice: (first cell, number deleted, new cells), or None.
    """

    uri: str
    splice: tuple[int, int, list[str]] | None
    closed: list[str]
    opened: list[Opened]
    edits: list[Edited]


@dataclass(frozen=True, slots=True)
class NotebookClosed:
    """A notebook that was closed, and those of its cells that the client names."""

    uri: str
    cells: list[str]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for suggestions at (line, character).

    Attributes:
        selected: what the item that is selected in the editor's popup would change; None without a popup.
    """

    uri: str
    position: tuple[int, int]
    invoked: bool
    selected: Change | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """A command to run, with whatever arguments."""

    name: str
    arguments: list[Any]


@dataclass(frozen=True, slots=True)
class Explain:
    """A question about the last answer for a document; with the texts only if the user wants to see them."""

    uri: str
    with_text: bool


def read_uri(params: Any) -> str:
    """`{textDocument: {uri}}`, which many methods have."""
    return _string(_object(_object(params).get("textDocument")).get("uri"))


def read_opened(params: Any) -> Opened:
    """`textDocument/didOpen`."""
    return _opened(_object(params).get("textDocument"))


def read_edited(params: Any) -> Edited:
    """`textDocument/didChange`."""
    params = _object(params)
    return _edited(params.get("textDocument"), params.get("contentChanges"))


def read_notebook_opened(params: Any) -> NotebookOpened:
    """`notebookDocument/didOpen`."""
    params = _object(params)
    notebook = _object(params.get("notebookDocument"))
    texts = [_opened(item) for item in _list(params.get("cellTextDocuments"))]
    return NotebookOpened(_string(notebook.get("uri")), _cells(notebook.get("cells")), texts)


def read_notebook_changed(params: Any) -> NotebookChanged:
    """`notebookDocument/didChange`."""
    params = _object(params)
    uri = _string(_object(params.get("notebookDocument")).get("uri"))
    cells = _object(_object(params.get("change")).get("cells") or {})
    structure = _object(cells.get("structure") or {})
    splice = None
    if (array := structure.get("array")) is not None:
        array = _object(array)
        splice = (
            _integer(array.get("start")),
            _integer(array.get("deleteCount")),
            _cells(array.get("cells")),
        )
    return NotebookChanged(
        uri,
        splice,
        [_string(_object(closed).get("uri")) for closed in _list(structure.get("didClose"))],
        [_opened(item) for item in _list(structure.get("didOpen"))],
        [
            _edited(_object(edit).get("document"), _object(edit).get("changes"))
            for edit in _list(cells.get("textContent"))
        ],
    )


def read_notebook_closed(params: Any) -> NotebookClosed:
    """`notebookDocument/didClose`."""
    params = _object(params)
    cells = [_string(_object(cell).get("uri")) for cell in _list(params.get("cellTextDocuments"))]
    return NotebookClosed(_string(_object(params.get("notebookDocument")).get("uri")), cells)


def read_completion(params: Any) -> Asked:
    """`textDocument/completion`."""
    return Asked(read_uri(params), _position(params.get("position")), invoked=False)


def read_inline_completion(params: Any) -> Asked:
    """`textDocument/inlineCompletion`.

    Clients from before LSP 3.18 was settled count from 0, Invoked 0 and Automatic 1; their Automatic
    cannot be told from the Invoked of today.
    """
    uri = read_uri(params)
    context = _object(params.get("context"))
    kind = _integer(context.get("triggerKind"))
    if not 0 <= kind <= _AUTOMATIC:
        raise MalformedError("triggerKind")
    return Asked(
        uri,
        _position(params.get("position")),
        invoked=kind <= _INVOKED,
        selected=_selected(context.get("selectedCompletionInfo")),
    )


def read_command(params: Any) -> Command:
    """`workspace/executeCommand`."""
    params = _object(params)
    return Command(_string(params.get("command")), _list(params.get("arguments")))


def read_explain(params: Any) -> Explain:
    """`midfill/explain`."""
    return Explain(read_uri(params), with_text=_object(params).get("text") is True)


def read_costs(params: Any) -> int:
    """`midfill/costs`: the number of the last record that the client knows."""
    return _integer(_object(params).get("after", 0))


READERS: dict[str, Callable[[Any], Any]] = {
    "textDocument/didOpen": read_opened,
    "textDocument/didChange": read_edited,
    "textDocument/didClose": read_uri,
    "notebookDocument/didOpen": read_notebook_opened,
    "notebookDocument/didChange": read_notebook_changed,
    "notebookDocument/didClose": read_notebook_closed,
    "textDocument/completion": read_completion,
    "textDocument/inlineCompletion": read_inline_completion,
    "workspace/executeCommand": read_command,
    "midfill/documentText": read_uri,
    "midfill/explain": read_explain,
    "midfill/costs": read_costs,
}


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedError("an object is missing")
    return value


def _list(value: Any) -> list[Any]:
    """A list; JSON's null and a missing key mean an empty one."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise MalformedError("a list is missing")
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise MalformedError("a string is missing")
    return value


def _integer(value: Any) -> int:
    # Clients whose language has one kind of number may send 3.0.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
        raise MalformedError("an integer is missing")
    return int(max(-_MAX, min(value, _MAX)))


def _selected(value: Any) -> Change | None:
    """The popup's selected item; None where it does not say what it would replace."""
    if value is None or _object(value).get("range") is None:
        return None
    return _change(value)


def _position(value: Any) -> tuple[int, int]:
    value = _object(value)
    return _integer(value.get("line")), _integer(value.get("character"))


def _cells(value: Any) -> list[str]:
    return [_string(_object(cell).get("document")) for cell in _list(value)]


def _opened(item: Any) -> Opened:
    item = _object(item)
    language_id, version = item.get("languageId"), item.get("version")
    return Opened(
        _string(item.get("uri")),
        language_id if isinstance(language_id, str) else "",
        version if isinstance(version, int) else 0,
        _string(item.get("text")),
    )


def _edited(identifier: Any, edits: Any) -> Edited:
    identifier = _object(identifier)
    version = identifier.get("version")
    return Edited(
        _string(identifier.get("uri")),
        version if isinstance(version, int) else None,
        [_change(edit) for edit in _list(edits)],
    )


def _change(edit: Any) -> Change:
    edit = _object(edit)
    text = _string(edit.get("text"))
    if (area := edit.get("range")) is None:
        return Change(text)
    # `rangeLength` is deprecated, and where it disagrees with the range it is wrong.
    return Change(text, _position(_object(area).get("start")), _position(area.get("end")))
