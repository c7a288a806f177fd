"""Play next-edit scenarios to the real server, by the messages that an editor would send."""

from __future__ import annotations

import time
from typing import Any

from midfill.engine.kv_slots import common_prefix
from midfill.evaluation.next_edits import Suggested, TextEdit, offset, point
from midfill.lsp.client import Client
from midfill.text.documents import Encoding, Point, count_code_points, count_units

_INVOKED = 1


class ServerEditor:
    """The real server over pipes, as an `evaluation.next_edits.Editor`, with a client that has loaded it."""

    def __init__(self, client: Client, model: str) -> None:
        self.model = model
        self._client = client
        self._texts: dict[str, str] = {}
        self._version = 0

    async def open(self, file: str, language: str, text: str) -> None:
        """Open a buffer."""
        self._texts[file] = text
        item = {"uri": _uri(file), "languageId": language, "version": self._next_version(), "text": text}
        self._client.notify("textDocument/didOpen", {"textDocument": item})

    async def change(self, file: str, text: str) -> None:
        """Make the buffer's text `text` in one edit of what differs."""
        old = self._texts[file]
        start = common_prefix(old, text)
        end = common_prefix(old[start:][::-1], text[start:][::-1])
        area = {"start": self._position(file, start), "end": self._position(file, len(old) - end)}
        document = {"uri": _uri(file), "version": self._next_version()}
        change = {"range": area, "text": text[start : len(text) - end]}
        self._client.notify("textDocument/didChange", {"textDocument": document, "contentChanges": [change]})
        self._texts[file] = text

    async def suggest(self, file: str, cursor: Point) -> Suggested:
        """Request a suggestion explicitly. The latency is the client's, from the request to the answer."""
        text = self._texts[file]
        params = {
            "textDocument": {"uri": _uri(file)},
            "position": self._position(file, offset(text, cursor)),
            "context": {"triggerKind": _INVOKED},
        }
        sent_s = time.monotonic()
        items = (await self._client.request("textDocument/inlineCompletion", params))["items"]
        latency_ms = (time.monotonic() - sent_s) * 1000
        return Suggested(self._edit(file, cursor, items[0]) if items else None, latency_ms)

    async def close_all(self) -> None:
        """Close all buffers."""
        for file in self._texts:
            self._client.notify("textDocument/didClose", {"textDocument": {"uri": _uri(file)}})
        self._texts.clear()

    def _edit(self, file: str, cursor: Point, item: dict[str, Any]) -> TextEdit:
        area = item.get("range")
        start, end = (
            (self._point(file, area[side]) for side in ("start", "end")) if area else (cursor, cursor)
        )
        return TextEdit(start, end, item["insertText"])

    def _position(self, file: str, index: int) -> dict[str, int]:
        at = point(self._texts[file], index)
        before = self._texts[file][index - at.column : index]
        return {"line": at.line, "character": count_units(before, Encoding.UTF16)}

    def _point(self, file: str, position: dict[str, int]) -> Point:
        line = self._texts[file].split("\n")[position["line"]]
        return Point(position["line"], count_code_points(line, position["character"], Encoding.UTF16))

    def _next_version(self) -> int:
        self._version += 1
        return self._version


def _uri(file: str) -> str:
    return f"file:///eval/{file}"
