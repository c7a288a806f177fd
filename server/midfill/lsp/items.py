"""Convert answers to the items that an editor shows: ghost text and entries of its popup.

Knows positions and LSP's types, but not how answers are made. Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lsprotocol import types

from midfill.completion.answer import Answer
from midfill.completion.autoclose import text_before_closers
from midfill.completion.closer_pairs import closer_pairs
from midfill.lsp.known_clients import find
from midfill.text.documents import Change, Encoding, Point, Snapshot, content_length, split_lines

_LABEL_CHARS = 60
_LONG_LINE = 2_000

_BACKTICKS = re.compile(r"`+")
_INFO = re.compile(r"[\w+#.-]*")
_WORD = re.compile(r"\w*\Z")
# The words of languages in which editors count more than letters and digits to a word.
_WORDS = {
    **dict.fromkeys(("css", "less", "scss", "sass", "html", "xml"), re.compile(r"[\w-]*\Z")),
    **dict.fromkeys(
        ("lisp", "commonlisp", "emacs-lisp", "elisp", "scheme", "racket", "clojure"),
        re.compile(r"[^\s()\[\]{}\"'`,;]*\Z"),
    ),
}


@dataclass(frozen=True, slots=True)
class PopupStyle:
    """How a client treats items of the popup.

    Attributes:
        markdown: it shows documentation as Markdown.
        insert_text_mode: it supports `insertTextMode`, and guesses the indentation of lines without it.
        takes_edits: it inserts the text of an edit unchanged (`known_clients`).
    """

    markdown: bool = False
    insert_text_mode: bool = False
    takes_edits: bool = True

    @staticmethod
    def of(params: types.InitializeParams) -> PopupStyle:
        """Return the style of the client that sent these params."""
        text_document = params.capabilities.text_document
        completion = text_document.completion if text_document else None
        item = completion.completion_item if completion else None
        formats = (item.documentation_format if item else None) or ()
        modes = item.insert_text_mode_support.value_set if item and item.insert_text_mode_support else ()
        return PopupStyle(
            types.MarkupKind.Markdown in formats,
            types.InsertTextMode.AsIs in modes,
            find(params.client_info).takes_edits,
        )


def inline_item(
    snapshot: Snapshot,
    answer: Answer,
    encoding: Encoding,
    selected: Change | None,
    command: types.Command | None,
) -> dict[str, Any]:
    """Return an item of `textDocument/inlineCompletion`.

    `selected` is the popup's selected item, which the editor would insert first: it shows only items that
    extend it and have the same range. The item's `data` tells a client which closers of the text an editor
    inserts by itself; `server/docs/editors.md` says how to use it.
    """
    num_before = 0
    if selected is not None and selected.start is not None and selected.end is not None:
        start, end = selected.start, selected.end
        if answer.num_replaced:
            # A closer is one unit long in every encoding.
            end = (end[0], end[1] + answer.num_replaced)
        area = types.Range(types.Position(*start), types.Position(*end))
        item: dict[str, Any] = {"insertText": selected.text + answer.text, "range": area}
        num_before = len(selected.text.replace("\r\n", "\n"))
    else:
        area = _range(snapshot, encoding, snapshot.cursor.column, answer.num_replaced)
        item = {"insertText": answer.text, "range": area}
    replaced = snapshot.line_after[: answer.num_replaced]
    pairs = closer_pairs(answer.text.replace("\r\n", "\n"), replaced)
    item["data"] = {
        "closers": [[-1 if at < 0 else num_before + at, num_before + closer] for at, closer in pairs]
    }
    if command is not None:
        item["command"] = command
    return item


def popup_item(
    snapshot: Snapshot, answer: Answer, encoding: Encoding, command: types.Command | None, style: PopupStyle
) -> types.CompletionItem | None:
    """Return an item of `textDocument/completion`, with the whole suggestion as its documentation.

    It begins with the word before the cursor, because editors filter items by that word. None if the client
    cannot replace what the suggestion replaces, and nothing is left without that.
    """
    before = snapshot.line_before
    text, num_replaced = answer.text, answer.num_replaced
    if num_replaced and not style.takes_edits:
        # A plain text cannot say what it replaces.
        text, num_replaced = text_before_closers(text, snapshot.line_after[:num_replaced]), 0
        if not text:
            return None
    pattern = _WORDS.get(snapshot.document.language_id, _WORD)
    word = found.group() if (found := pattern.search(before[-_LONG_LINE:])) else ""
    lines = [line[: content_length(line)] for line in split_lines(word + text)]
    first = next(line for line in lines if line.strip())
    label = first.strip()
    area = _range(snapshot, encoding, len(before) - len(word), num_replaced)
    # A line too long for any popup is not repeated in it.
    shown = before.lstrip() if len(before) <= _LONG_LINE else word
    return types.CompletionItem(
        label=label if len(label) <= _LABEL_CHARS else label[: _LABEL_CHARS - 1] + "…",
        kind=types.CompletionItemKind.Text,
        detail="midfill",
        documentation=_documentation(snapshot.document.sent_language, shown + text, markdown=style.markdown),
        # After the items of the language's own server.
        sort_text="\U0010ffff",
        filter_text=first,
        text_edit=types.TextEdit(area, word + text) if style.takes_edits else None,
        insert_text=None if style.takes_edits else word + text,
        insert_text_format=types.InsertTextFormat.PlainText,
        insert_text_mode=types.InsertTextMode.AsIs if style.insert_text_mode else None,
        command=command,
    )


def with_selected(snapshot: Snapshot, selected: Change, encoding: Encoding) -> Snapshot:
    """Return the document as if the popup's selected item were accepted, with the cursor after it."""
    document = snapshot.document
    edited = document.edit([selected], document.version, encoding)
    start, _ = sorted(document.point(end or (0, 0), encoding) for end in (selected.start, selected.end))
    *above, last = split_lines(selected.text)
    column = len(last) + (0 if above else start.column)
    return Snapshot(edited, Point(start.line + len(above), column))


def _documentation(language_id: str, code: str, *, markdown: bool) -> types.MarkupContent | str:
    code = "\n".join(line[: content_length(line)] for line in split_lines(code))
    if not markdown:
        return code
    # The fence must be longer than any run of backticks in the code.
    longest = max(map(len, _BACKTICKS.findall(code)), default=0)
    fence = "`" * max(3, longest + 1)
    info = language_id if _INFO.fullmatch(language_id) else ""
    return types.MarkupContent(types.MarkupKind.Markdown, f"{fence}{info}\n{code}\n{fence}")


def _range(snapshot: Snapshot, encoding: Encoding, from_column: int, num_replaced: int) -> types.Range:
    """Return the range from a column of the cursor's line to `num_replaced` characters after the cursor."""
    line, column = snapshot.cursor.line, snapshot.cursor.column
    ends = (Point(line, from_column), Point(line, column + num_replaced))
    return types.Range(*(types.Position(*snapshot.document.position(end, encoding)) for end in ends))
