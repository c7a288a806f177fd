"""Fill holes for an evaluation: with the pipeline or the model alone; `lsp.server_filler` uses the server.

All convert a `Hole` to a `Filled`, with a different part of midfill between. The server gets what an editor
would send, so that its answers are those that a user gets.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from midfill.completion.answer import Trigger
from midfill.completion.completer import Completer
from midfill.engine.api import Engine, Request
from midfill.fim.templates import Layout, recognise_family
from midfill.settings import Settings
from midfill.text.documents import Document, Point, Snapshot


@dataclass(frozen=True, slots=True)
class Hole:
    """A document with a cursor in it.

    Attributes:
        uri: the document's URI.
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
        """The position of the cursor."""
        return Point(self.before.count("\n"), len(self.line_before))


@dataclass(frozen=True, slots=True)
class Filled:
    r"""The answer for a hole.

    Attributes:
        text: the text to insert; "" for none. Line ends are \n.
        reason: why there is no text.
        latency_ms: time from request to answer.
        tokens: (end in the text, log-probability) of each token; () if not known.
        finished: whether the text is complete, not cut by a limit.
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
        """The name of the model."""
        ...

    async def fill(self, hole: Hole, trigger: Trigger) -> Filled:
        """Return the suggestion that a user would get at the cursor."""
        ...


class PipelineFiller:
    """The pipeline in this process, with a started engine."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.model = engine.model.name
        self._completer = Completer(settings.model_copy(update={"prefetch": False}))
        self._completer.use(engine)

    async def open_folder(self, folder: Path) -> None:
        """Index a workspace folder, if the setting `context` asks for it, and wait until that is done."""
        self._completer.context.open_folders([(folder.name, folder)])
        await self._completer.context.indexed()

    def close(self) -> None:
        """Stop background work."""
        self._completer.context.close()

    async def fill(self, hole: Hole, trigger: Trigger) -> Filled:
        """Return the pipeline's answer."""
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
    """The model alone: a prompt as in the model's paper, without stop rules."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.model = engine.model.name
        self._engine = engine
        self._settings = settings

    async def fill(self, hole: Hole, _trigger: Trigger) -> Filled:
        """Return the model's output."""
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
