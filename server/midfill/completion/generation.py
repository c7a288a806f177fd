"""Generation: the engine's text for one suggestion, normalized, up to the end of the suggestion.

Knows the text around the cursor, but no documents. Runs on the event loop.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from midfill.completion.postprocess.cursor_context import CursorContext
from midfill.completion.postprocess.normalization import Normalizer
from midfill.completion.postprocess.stop import Stopper
from midfill.completion.reasons import Reason
from midfill.engine.api import Engine, Request


@dataclass(slots=True)
class Generation:
    """The model's text for one suggestion, and how it ended.

    Attributes:
        text: the text at the cursor, up to the end of the suggestion.
        raw: all of the model's text at the cursor.
        complete: it reached the end of the suggestion, not the token limit.
        ended: the model itself ended the text.
        is_cut: it was cut at a character that is not safe to show.
        is_altered: line ends or indentation differ from what the model wrote.
        failure: the reason why it is of no use; None if it is of use.
        detail: a sentence about the failure, or about the end of the text; or "".
        late: the incomplete line that was written when the deadline passed; it is in neither text.
        tokens: (end, log-probability) for each token; `end` is an offset in `text`, at most 0 before the
            cursor.
    """

    text: str = ""
    raw: str = ""
    complete: bool = False
    ended: bool = False
    is_cut: bool = False
    is_altered: bool = False
    failure: Reason | None = None
    detail: str = ""
    late: str = ""
    tokens: list[tuple[int, float]] = field(default_factory=list)

    def keep_whole_lines(self) -> bool:
        """Drop the incomplete line at the end when the deadline has passed. Returns whether text is left."""
        end = self.raw.rfind("\n") + 1
        self.late = self.raw[end:]
        self.text = self.raw = self.raw[:end]
        return bool(self.text.strip())

    def within(self, num_chars: int) -> tuple[tuple[int, float], ...]:
        """Return those tokens that the first `num_chars` characters are made of."""
        begins = [0, *(end for end, _ in self.tokens)]
        return tuple(
            token
            for begin, token in zip(begins, self.tokens, strict=False)
            if token[0] > 0 and begin < num_chars
        )

    def part(self, start: int, end: int | None) -> Generation:
        """Return the part of `raw` between two offsets, as if the model had ended there."""
        tokens = [(at - start, logprob) for at, logprob in self.tokens]
        return Generation(self.raw[start:end], complete=True, tokens=tokens)


async def stream(
    engine: Engine,
    request: Request,
    cursor: CursorContext,
    output: Generation,
    on_text: Callable[[str], None],
) -> None:
    """Collect the model's text after `forced_prefix` in `output`, up to the end of the suggestion.

    `on_text` is called with all of the text after each token.
    """
    num_held = len(request.forced_prefix)
    whole, stopper = Normalizer(cursor), Stopper(cursor)
    async with aclosing(engine.generate(request)) as tokens:
        async for token in tokens:
            whole.push(token.text[num_held:])
            num_held = max(0, num_held - len(token.text))
            output.text = output.raw = whole.text
            output.is_altered = whole.is_altered
            if token.logprob is not None:
                output.tokens.append((len(whole.text) - num_held, token.logprob))
            on_text(output.raw)
            if output.text and (end := stopper.end(output.text)) is not None:
                output.text, output.complete = output.text[:end], True
                return
            if whole.is_cut:
                output.is_cut = True
                return
    whole.finish()
    output.text = output.raw = whole.text
    output.complete = output.ended = request.stats.num_generated < request.max_new_tokens
