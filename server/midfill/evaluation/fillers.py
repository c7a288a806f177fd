"""What fills a hole: the pipeline, the server in a process of its own, or the model alone.

All take a `Hole` and give a `Filled`; they differ in how much of midfill lies between. The server gets
what an editor would send it, so that its answers are those that a user gets.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from midfill.client import SERVE_COMMAND, Client
from midfill.completer import Completer, Trigger
from midfill.documents import Document, Encoding, Point, Snapshot, count_units
from midfill.engine import Engine, Progress, Request
from midfill.families import Layout, recognise_family
from midfill.settings import Settings


@dataclass(frozen=True, slots=True)
class Hole:
    """A document with a cursor in it.

    Attributes:
        uri: the document's name.
        language: LSP language identifier.
        before, after: the text on both sides of the cursor.
    """

    uri: str
    language: str
    before: str
    after: str

    @property
    def line_before(self) -> str:
        """The cursor's line up to the cursor."""
        return self.before[self.before.rfind("\n") + 1 :]

    @property
    def cursor(self) -> Point:
        """Where the cursor stands."""
        return Point(self.before.count("\n"), len(self.line_before))


@dataclass(frozen=True, slots=True)
class Filled:
    r"""What came for a hole.

    Attributes:
        text: what is to be inserted; "" for nothing. Line ends are \n.
        reason: why there is nothing.
        latency_ms: from asking to having it.
        tokens: where each of the text's tokens ends, and its log-probability; () where it is not known.
        finished: the text came to an end of its own.
    """

    text: str
    reason: str | None = None
    latency_ms: float = 0.0
    tokens: tuple[tuple[int, float], ...] = ()
    finished: bool = False


class Filler(Protocol):
    """Fills holes, one at a time."""

    @property
    def model(self) -> str:
        """The name of the model behind it."""
        ...

    async def fill(self, hole: Hole, trigger: Trigger) -> Filled:
        """What a user would get at the cursor."""
        ...


class PipelineFiller:
    """The pipeline in this process, with a started engine."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.model = engine.model.name
        self._completer = Completer(settings)
        self._completer.use(engine)

    async def open_folder(self, folder: Path) -> None:
        """Index a workspace folder, if the setting `context` asks for it, and wait until that is done."""
        self._completer.context.open_folders([(folder.name, folder)])
        await self._completer.context.indexed()

    def close(self) -> None:
        """End what runs in the background."""
        self._completer.context.close()

    async def fill(self, hole: Hole, trigger: Trigger) -> Filled:
        """See `Filler.fill`."""
        document = Document.open(hole.uri, hole.language, 0, hole.before + hole.after)
        snapshot = Snapshot(document, hole.cursor)
        answer = await self._completer.complete(snapshot, trigger)
        self._completer.forget(hole.uri)
        return Filled(
            answer.text.replace(snapshot.line_ending, "\n"),
            answer.reason,
            answer.latency_ms,
            answer.tokens,
            answer.finished,
        )


class RawFiller:
    """The model alone: prefix, suffix, middle as in the family's paper; nothing stops it but itself."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.model = engine.model.name
        self._engine = engine
        self._settings = settings

    async def fill(self, hole: Hole, _trigger: Trigger) -> Filled:
        """See `Filler.fill`."""
        model = self._engine.model
        family = recognise_family(model, self._settings.family)[1]
        layout = Layout.PSM if Layout.PSM in family.layouts else family.layouts[0]
        encode = model.tokenizer.encode
        texts = {
            "head": encode(hole.before)[-self._settings.prefix_tokens :],
            "typed": [],
            "tail": encode(hole.after)[: self._settings.suffix_tokens],
        }
        tokens_in = []
        for kind, name in family.parts(layout):
            sentinel = model.tokenizer.token_id(name)
            tokens_in += texts[name] if kind == "text" else [sentinel] if sentinel is not None else []
        request = Request(tuple(tokens_in), self._settings.max_new_tokens)
        text = ""
        spans = []
        async with aclosing(self._engine.generate(request)) as tokens:
            async for token in tokens:
                text += token.text
                if token.logprob is not None:
                    spans.append((len(text), token.logprob))
        stats = request.stats
        return Filled(
            text,
            None if text else "model-silent",
            (stats.ended_s - stats.submitted_s) * 1000,
            tuple(spans),
            stats.num_generated < request.max_new_tokens,
        )


class ServerFiller:
    """The real server over pipes. Make it with `start`, and close it."""

    def __init__(self, client: Client, model: str) -> None:
        self.model = model
        self._client = client

    @classmethod
    async def start(
        cls,
        options: Mapping[str, Any],
        model: str,
        report: Progress,
        engine: str | None = None,
        folder: Path | None = None,
    ) -> ServerFiller:
        """Start a server and wait until it has loaded its model.

        `options` are settings as an editor sends them; `engine` names a script instead of a model, for
        tests; `folder` is the workspace, which has then been indexed. Raises `MidfillError` with what the
        server says if it cannot load.
        """
        client = await Client.start([*SERVE_COMMAND, *(["--engine", engine] if engine else [])])
        try:
            await client.load(options, lambda message: report(message, None), folder=folder)
            await client.request("midfill/indexed", None)
        except BaseException:
            await client.close()
            raise
        return cls(client, model)

    async def close(self) -> None:
        """End the server."""
        await self._client.close()

    async def fill(self, hole: Hole, trigger: Trigger) -> Filled:
        """See `Filler.fill`. The time is the client's, from the request to the answer."""
        item = {"uri": hole.uri, "languageId": hole.language, "version": 1, "text": hole.before + hole.after}
        document = {"textDocument": {"uri": hole.uri}}
        line, column = hole.cursor.line, count_units(hole.line_before, Encoding.UTF16)
        self._client.notify("textDocument/didOpen", {"textDocument": item})
        begun = time.monotonic()
        params = document | {
            "position": {"line": line, "character": column},
            "context": {"triggerKind": 1 if trigger is Trigger.INVOKED else 2},
        }
        items = (await self._client.request("textDocument/inlineCompletion", params))["items"]
        latency_ms = (time.monotonic() - begun) * 1000
        why = await self._client.request("midfill/explain", document)
        self._client.notify("textDocument/didClose", document)
        return Filled(_inserted(items[0], hole) if items else "", why["reason"], latency_ms)


def _inserted(item: Mapping[str, Any], hole: Hole) -> str:
    """The text between `before` and `after` once an editor has applied the item.

    An item may replace what stands around the cursor and say it again; that is not part of the hole.
    """
    text: str = item["insertText"].replace("\r\n", "\n")
    area = item.get("range")
    if area is None:
        return text
    column = count_units(hole.line_before, Encoding.UTF16)
    num_before, num_after = column - area["start"]["character"], area["end"]["character"] - column
    said_before = hole.line_before[len(hole.line_before) - num_before :] if num_before > 0 else ""
    said_after = hole.after[:num_after] if num_after > 0 else ""
    return text.removeprefix(said_before).removesuffix(said_after)


def options_of(settings: Settings, base: Settings) -> dict[str, Any]:
    """What an editor has to send so that a server with `base` has `settings`."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in settings.model_dump().items()
        if value != getattr(base, name)
    }
