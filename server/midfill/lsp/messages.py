"""Read the params of requests and notifications about documents and cursors from raw JSON.

lsprotocol's types are not used for these: they refuse what real editors send (`"range": null`, a missing
version, triggerKind 0), and a refused edit would leave the server with another text than the editor's.
They also take longer than all other work per keystroke.

A reader takes the params of one method and raises `MalformedError` if they are malformed.
Knows nothing of pygls. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from midfill.text.documents import Change

# LSP's integers go to 2**31 - 1; a larger one means "the end".
_MAX = 2**31 - 1
_INVOKED = 1
_AUTOMATIC = 2


# The client name of midfill's own clients: the demo, the evaluations and the benchmarks.
OWN_CLIENT = "midfill"
# Before the recorded client's name, in a replay: answered like that client, and not counted either.
REPLAYED = "midfill replay of "
# The environment variable that adds the requests which only tests and benchmarks send, if it is set.
TEST_HOOKS = "MIDFILL_TEST_HOOKS"


class MalformedError(ValueError):
    """Params that do not have the form that their method wants. The message quotes nothing of them."""


class ResponseError(Exception):
    """An error response. The message is a sentence without paths, text or traceback.

    Attributes:
        code: of JSON-RPC or LSP.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = int(code)
        self.message = message


@dataclass(frozen=True, slots=True)
class OpenedDocument:
    """A document that was opened, with its whole text."""

    uri: str
    language_id: str
    version: int
    text: str


@dataclass(frozen=True, slots=True)
class EditedDocument:
    """Changes of one document, in order. `version` is None if the client did not send it."""

    uri: str
    version: int | None
    changes: list[Change]


@dataclass(frozen=True, slots=True)
class OpenedNotebook:
    """A notebook that was opened: the URIs of its cells in order, and the cells' documents."""

    uri: str
    cells: list[str]
    documents: list[OpenedDocument]


@dataclass(frozen=True, slots=True)
class ChangedNotebook:
    """The changes of a notebook, to be applied in the order of the attributes.

    Attributes:
        splice: (first cell, number deleted, new cells), or None.
    """

    uri: str
    splice: tuple[int, int, list[str]] | None
    closed: list[str]
    opened: list[OpenedDocument]
    edits: list[EditedDocument]


@dataclass(frozen=True, slots=True)
class ClosedNotebook:
    """A notebook that was closed, and those of its cells that the client names."""

    uri: str
    cells: list[str]


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A request for suggestions at (line, character).

    Attributes:
        invoked: the user asked explicitly, by a key or a command.
        selected: the change that the selected item of the editor's popup would make; None without a popup.
    """

    uri: str
    position: tuple[int, int]
    invoked: bool
    selected: Change | None = None


@dataclass(frozen=True, slots=True)
class CommandCall:
    """A command to run and its arguments, unchecked."""

    name: str
    arguments: list[Any]


@dataclass(frozen=True, slots=True)
class ExplainRequest:
    """A question about the last answer for a document; with its texts only if the user wants to see them."""

    uri: str
    with_text: bool


def read_uri(params: Any) -> str:
    """Read the URI in `{textDocument: {uri}}`, the params of several methods."""
    return _string(_object(_object(params).get("textDocument")).get("uri"))


def read_opened(params: Any) -> OpenedDocument:
    """Read the params of `textDocument/didOpen`."""
    return _opened(_object(params).get("textDocument"))


def read_edited(params: Any) -> EditedDocument:
    """Read the params of `textDocument/didChange`."""
    params = _object(params)
    return _edited(params.get("textDocument"), params.get("contentChanges"))


def read_notebook_opened(params: Any) -> OpenedNotebook:
    """Read the params of `notebookDocument/didOpen`."""
    params = _object(params)
    notebook = _object(params.get("notebookDocument"))
    documents = [_opened(item) for item in _list(params.get("cellTextDocuments"))]
    return OpenedNotebook(_string(notebook.get("uri")), _cells(notebook.get("cells")), documents)


def read_notebook_changed(params: Any) -> ChangedNotebook:
    """Read the params of `notebookDocument/didChange`."""
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
    return ChangedNotebook(
        uri,
        splice,
        [_string(_object(closed).get("uri")) for closed in _list(structure.get("didClose"))],
        [_opened(item) for item in _list(structure.get("didOpen"))],
        [
            _edited(_object(edit).get("document"), _object(edit).get("changes"))
            for edit in _list(cells.get("textContent"))
        ],
    )


def read_notebook_closed(params: Any) -> ClosedNotebook:
    """Read the params of `notebookDocument/didClose`."""
    params = _object(params)
    cells = [_string(_object(cell).get("uri")) for cell in _list(params.get("cellTextDocuments"))]
    return ClosedNotebook(_string(_object(params.get("notebookDocument")).get("uri")), cells)


def read_completion(params: Any) -> CompletionRequest:
    """Read the params of `textDocument/completion`."""
    return CompletionRequest(read_uri(params), _position(params.get("position")), invoked=False)


def read_inline_completion(params: Any) -> CompletionRequest:
    """Read the params of `textDocument/inlineCompletion`.

    Clients older than the final LSP 3.18 send 0 for Invoked and 1 for Automatic; their Automatic cannot be
    told from today's Invoked.
    """
    uri = read_uri(params)
    context = _object(params.get("context"))
    kind = _integer(context.get("triggerKind"))
    if not 0 <= kind <= _AUTOMATIC:
        raise MalformedError("`triggerKind` is neither 1 (Invoked) nor 2 (Automatic)")
    return CompletionRequest(
        uri,
        _position(params.get("position")),
        invoked=kind <= _INVOKED,
        selected=_selected(context.get("selectedCompletionInfo")),
    )


def read_command(params: Any) -> CommandCall:
    """Read the params of `workspace/executeCommand`."""
    params = _object(params)
    return CommandCall(_string(params.get("command")), _list(params.get("arguments")))


def read_explain(params: Any) -> ExplainRequest:
    """Read the params of `midfill/explain`."""
    return ExplainRequest(read_uri(params), with_text=_object(params).get("text") is True)


def read_costs(params: Any) -> int:
    """Read the params of `midfill/costs`: the number of the last record that the client knows."""
    return _integer(_object(params).get("after", 0))


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedError("an object is expected")
    return value


def _list(value: Any) -> list[Any]:
    """Return a list; null and a missing key mean an empty one."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise MalformedError("a list is expected")
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise MalformedError("a string is expected")
    return value


def _integer(value: Any) -> int:
    # Clients whose language has one kind of number may send 3.0.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
        raise MalformedError("an integer is expected")
    return int(max(-_MAX, min(value, _MAX)))


def _selected(value: Any) -> Change | None:
    """Return the change of the popup's selected item; None if it does not say what it would replace."""
    if value is None or _object(value).get("range") is None:
        return None
    return _change(value)


def _position(value: Any) -> tuple[int, int]:
    value = _object(value)
    return _integer(value.get("line")), _integer(value.get("character"))


def _cells(value: Any) -> list[str]:
    return [_string(_object(cell).get("document")) for cell in _list(value)]


def _opened(item: Any) -> OpenedDocument:
    item = _object(item)
    language_id, version = item.get("languageId"), item.get("version")
    return OpenedDocument(
        _string(item.get("uri")),
        language_id if isinstance(language_id, str) else "",
        version if isinstance(version, int) else 0,
        _string(item.get("text")),
    )


def _edited(identifier: Any, edits: Any) -> EditedDocument:
    identifier = _object(identifier)
    version = identifier.get("version")
    return EditedDocument(
        _string(identifier.get("uri")),
        version if isinstance(version, int) else None,
        [_change(edit) for edit in _list(edits)],
    )


def _change(edit: Any) -> Change:
    edit = _object(edit)
    text = _string(edit.get("text"))
    if (area := edit.get("range")) is None:
        return Change(text)
    # `rangeLength` is deprecated, and if it disagrees with the range it is wrong.
    return Change(text, _position(_object(area).get("start")), _position(area.get("end")))
