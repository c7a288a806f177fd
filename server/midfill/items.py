"""Suggestions as the items that an editor shows: ghost text and entries of the popup.

Knows positions and the protocol's types, not where suggestions come from. Runs on the event loop.
"""

from __future__ import annotations

from typing import Any

from lsprotocol import types

from midfill.documents import Change, Encoding, Point, Snapshot, split_lines

_LABEL_CHARS = 60
_LONG_LINE = 2_000


def inline_item(
    snapshot: Snapshot, text: str, encoding: Encoding, selected: Change | None, command: types.Command | None
) -> dict[str, Any]:
    """An item of `textDocument/inlineCompletion`.

    `selected` is the popup's item that the editor would insert first: the editor shows only what extends
    it, over the same range.
    """
    if selected is not None and selected.start is not None and selected.end is not None:
        area = types.Range(types.Position(*selected.start), types.Position(*selected.end))
        item: dict[str, Any] = {"insertText": selected.text + text, "range": area}
    else:
        item = {"insertText": text, "range": _range(snapshot, encoding, snapshot.cursor.column)}
    if command is not None:
        item["command"] = command
    return item


def popup_item(
    snapshot: Snapshot, text: str, encoding: Encoding, command: types.Command | None, *, markdown: bool
) -> types.CompletionItem:
    """An item of `textDocument/completion`, with the whole suggestion as its documentation."""
    typed = snapshot.line_before.lstrip()
    if len(typed) > _LONG_LINE:
        # Of a line that no popup can show, nothing is repeated.
        typed = ""
    whole = typed + text
    label = whole.strip().splitlines()[0]
    return types.CompletionItem(
        label=label if len(label) <= _LABEL_CHARS else label[: _LABEL_CHARS - 1] + "…",
        kind=types.CompletionItemKind.Text,
        detail="midfill",
        documentation=_documentation(snapshot.document.language_id, whole, markdown=markdown),
        # Behind the items of the language's own server.
        sort_text="\U0010ffff",
        filter_text=whole,
        text_edit=types.TextEdit(
            _range(snapshot, encoding, len(snapshot.line_before) - len(typed)),
            whole,
        ),
        insert_text_format=types.InsertTextFormat.PlainText,
        command=command,
    )


def with_selected(snapshot: Snapshot, selected: Change, encoding: Encoding) -> Snapshot:
    """The document as it would be with the popup's selected item accepted, and the cursor behind that."""
    document = snapshot.document
    edited = document.edit([selected], document.version, encoding)
    start, _ = sorted(document.point(end or (0, 0), encoding) for end in (selected.start, selected.end))
    *above, last = split_lines(selected.text)
    column = len(last) + (0 if above else start.column)
    return Snapshot(edited, Point(start.line + len(above), column))


def _documentation(language_id: str, code: str, *, markdown: bool) -> types.MarkupContent | str:
    if markdown:
        return types.MarkupContent(types.MarkupKind.Markdown, f"```{language_id}\n{code}\n```")
    return code


def _range(snapshot: Snapshot, encoding: Encoding, from_column: int) -> types.Range:
    """From a column of the cursor's line to the cursor."""
    ends = (Point(snapshot.cursor.line, from_column), snapshot.cursor)
    return types.Range(*(types.Position(*snapshot.document.position(end, encoding)) for end in ends))
