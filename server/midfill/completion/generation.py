"""What the engine gives for one suggestion: its text as the file writes it, up to where the suggestion ends.

Knows nothing of documents but the place. Runs on the event loop.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from midfill.completion.postprocess.clean import Stopper
from midfill.completion.postprocess.cursor_context import Place
from midfill.completion.postprocess.normalization import Normalizer
from midfill.completion.reasons import Reason
from midfill.completion.suggestions import InFlightCompletion
from midfill.engine.api import Engine, Request


@dataclass(slots=True)
class Output:
    """What came from the engine.

    Attributes:
        text: what the model wrote at the cursor, up to where the suggestion ends.
        raw: all that it wrote there.
        complete: whether it came to the suggestion's end, not to its token limit.
        ended: whether the model itself came to an end.
        is_cut: whether it was cut at a character that is not safe to show.
        is_altered: whether line ends or indentation are not as the model wrote them.
        failure: why it is of no use; None if it is.
        detail: what there is to say about that, or about its end: a sentence.
        late: the half of a line that was written when the time was over; it is in neither text.
        tokens: for each, where it ends in `text` (0 and less: before the cursor) and its log-probability.
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
        """The time is over: drop the half of a line at the end. Returns whether something is left."""
        end = self.raw.rfind("\n") + 1
        self.late = self.raw[end:]
        self.text = self.raw = self.raw[:end]
        return bool(self.text.strip())

    def within(self, num_chars: int) -> tuple[tuple[int, float], ...]:
        """The tokens that the first `num_chars` characters are made of."""
        begins = [0, *(end for end, _ in self.tokens)]
        return tuple(
            token
            for begin, token in zip(begins, self.tokens, strict=False)
            if token[0] > 0 and begin < num_chars
        )

    def beyond(self, start: int, end: int | None) -> Output:
        """The part of `raw` from one character to another, as if the model had come to its end there."""
        tokens = [(at - start, logprob) for at, logprob in self.tokens]
        return Output(self.raw[start:end], complete=True, tokens=tokens)


async def stream(engine: Engine, request: Request, place: Place, flight: InFlightCompletion[Any], output: Output) -> None:
    """Collect the model's text after `forced_prefix`; stop it where the suggestion has come to its end."""
    num_held = len(request.forced_prefix)
    whole, stopper = Normalizer(place), Stopper(place)
    async with aclosing(engine.generate(request)) as tokens:
        async for token in tokens:
            whole.push(token.text[num_held:])
            num_held = max(0, num_held - len(token.text))
            output.text = output.raw = whole.text
            output.is_altered = whole.is_altered
            if token.logprob is not None:
                output.tokens.append((len(whole.text) - num_held, token.logprob))
            flight.push(output.raw)
            if output.text and (end := stopper.end(output.text)) is not None:
                output.text, output.complete = output.text[:end], True
                return
            if whole.is_cut:
                output.is_cut = True
                return
    whole.finish()
    output.text = output.raw = whole.text
    output.complete = output.ended = request.stats.num_generated < request.max_new_tokens
