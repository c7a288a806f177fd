"""Answers to completion requests: the text to show or the reason for showing none, and how it was made.

Values only; knows nothing of LSP, engines or caches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from midfill.completion.prompt import Prompt
from midfill.completion.reasons import Reason


class Trigger(StrEnum):
    """What caused a request."""

    AUTOMATIC = "automatic"
    """The editor, after a key."""
    INVOKED = "invoked"
    """The user, by a command."""


class AnswerSource(StrEnum):
    """Where an answer comes from. The values are part of the JSON that users see."""

    NONE = "none"
    MODEL = "model"
    """Computed for this request."""
    TYPED_THROUGH = "typed-through"
    """The remainder of a suggestion that the user is typing, or has accepted in part."""
    CACHE = "cache"
    """Computed earlier for exactly this text."""
    JOINED = "joined"
    """Already being computed for an earlier request, and consistent with what was typed since."""
    CONTINUATION = "continuation"
    """Text that the model wrote after the end of the previous suggestion."""
    PREFETCH = "prefetch"
    """Computed ahead, as if the previous suggestion had been accepted, which then happened."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What to show at the cursor.

    Attributes:
        text: the text to insert at the cursor, with the file's own line ends; "" for nothing.
        num_replaced: number of characters directly after the cursor that the text replaces: auto-closed
            brackets and quotes that the text contains too.
        source: where the text comes from.
        reason: why there is no text; None if there is some.
        detail: a sentence about the reason, or about where the text ends; or "".
        latency_ms: time from the call of `complete` to this answer.
        num_prompt, num_reused, num_generated: tokens in the prompt, of these found in the KV cache, and
            written.
        segments: (name, number of tokens) for each part of the prompt.
        prompt: what the model read; None if it was not asked. For explanations, like the next two.
        stages: (name, milliseconds) for each stage.
        texts: (filter, text after it) for each filter that changed the text; the first is the model's own
            text.
        tokens: (end, log-probability) for each token of the text; `end` is an offset in the text.
        finished: the text ended by itself, not at the token limit.
    """

    text: str = ""
    num_replaced: int = 0
    source: AnswerSource = AnswerSource.NONE
    reason: Reason | None = None
    detail: str = ""
    latency_ms: float = 0.0
    num_prompt: int = 0
    num_reused: int = 0
    num_generated: int = 0
    segments: tuple[tuple[str, int], ...] = ()
    prompt: Prompt | None = None
    stages: tuple[tuple[str, float], ...] = ()
    texts: tuple[tuple[str, str], ...] = ()
    tokens: tuple[tuple[int, float], ...] = ()
    finished: bool = False

    def without_model_work(self) -> Answer:
        """Return the same answer without the account of the model's work: this time the model did none."""
        return replace(
            self, num_prompt=0, num_reused=0, num_generated=0, segments=(), prompt=None, stages=(), texts=()
        )
