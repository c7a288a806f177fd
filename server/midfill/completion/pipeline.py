"""The pipeline from a snapshot to a suggestion: context > prompt > generate > postprocess > confidence.

Holds the engine and the settings of one moment; new settings make a new pipeline. Knows nothing of caches or
LSP. Runs on the event loop; the only thing it waits for is the engine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from midfill.completion.answer import Answer, AnswerSource, Trigger
from midfill.completion.cache import Computed
from midfill.completion.confidence import Calibration, Eagerness, Evidence, best, length_to_show
from midfill.completion.context.collector import ContextCollector
from midfill.completion.generation import Generation, stream
from midfill.completion.in_flight import InFlightCompletion
from midfill.completion.postprocess.clean import before_unsafe, clean
from midfill.completion.postprocess.cursor_context import CursorContext
from midfill.completion.prompt import PromptBuilder
from midfill.completion.reasons import Reason
from midfill.completion.stats.request_log import stages
from midfill.engine.api import Engine, Request
from midfill.errors import EngineError, EngineUnavailableError
from midfill.settings import Settings
from midfill.text.documents import Document, Snapshot

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Asks one engine with one set of settings.

    Attributes:
        engine: a started engine.
        prompts: builds prompts for the engine's model.
        context: collects pieces of other files.
        adapter_of: returns the adapter for a document; see `Request.adapter`.
        calibration: the weights by which automatic suggestions are judged.
    """

    engine: Engine
    prompts: PromptBuilder
    settings: Settings
    context: ContextCollector
    adapter_of: Callable[[Document], str | None]
    calibration: Calibration

    async def compute(self, snapshot: Snapshot, in_flight: InFlightCompletion) -> Computed:
        """Ask the model, and return what is worth showing. Never raises for a fault of the engine."""
        begun = time.monotonic()
        trigger = Trigger.INVOKED if in_flight.explicit else Trigger.AUTOMATIC
        cursor = CursorContext.of(snapshot, invoked=in_flight.explicit)
        bundle = self.context.collect(snapshot)
        prompt = self.prompts.build(snapshot, bundle, max_new_tokens=self._max_new_tokens(trigger))
        request = Request(
            prompt.tokens,
            prompt.max_new_tokens,
            prompt.stop_ids,
            forced_prefix=prompt.forced_prefix,
            adapter=self.adapter_of(snapshot.document),
        )
        in_flight.run_as(request)
        built = time.monotonic()
        output = await self._generate(request, cursor, in_flight.push)
        written = time.monotonic()
        cleaned = self.postprocess(output, cursor)
        answer = self.filter_by_confidence(cleaned, cursor, trigger)
        answer = replace(
            answer,
            num_prompt=len(prompt.tokens),
            num_reused=request.stats.num_reused,
            num_generated=request.stats.num_generated,
            segments=prompt.segments,
            prompt=prompt,
            stages=stages(begun, built, request.stats, written),
            texts=_changed_texts(output, cleaned, answer),
        )
        return Computed(answer, output, bundle)

    def prefill_ahead(self, snapshot: Snapshot) -> None:
        """Let the model read, at idle priority, the prompt that a request at this cursor would have.

        First choose the context and the prompt's anchor again, while no request waits for the result.
        """
        if self.settings.context:
            self.context.renew(snapshot)
        prompt = self.prompts.build_moving_anchor(snapshot, self.context.collect(snapshot))
        self.engine.prewarm(prompt.tokens, self.adapter_of(snapshot.document))

    def postprocess(self, output: Generation, cursor: CursorContext) -> Answer:
        """Return the part of the model's text that is worth inserting, or the reason why there is none."""
        if output.failure is not None:
            return Answer(reason=output.failure, detail=output.detail)
        # All of it: the text after the suggestion's end tells how the suggestion ends.
        text = output.raw or output.text
        if output.is_cut:
            if not text.strip():
                return Answer(reason=Reason.UNSAFE_CHARACTERS)
            text = before_unsafe(text, cursor)
        complete = output.complete or output.is_cut
        text, reason = clean(text, cursor, complete=complete, forbidden=self.prompts.family.never_text)
        if reason is not None:
            return Answer(reason=reason)
        return Answer(
            text,
            source=AnswerSource.MODEL,
            detail=output.detail,
            tokens=output.within(len(text)),
            finished=output.complete,
        )

    def filter_by_confidence(self, answer: Answer, cursor: CursorContext, trigger: Trigger) -> Answer:
        """Return those first lines of an automatic answer that are likely enough to be right."""
        if trigger is Trigger.INVOKED or not answer.text:
            return answer
        evidence = Evidence(answer.text, answer.tokens, answer.finished, cursor.line_before)
        eagerness = Eagerness(self.settings.eagerness)
        if (end := length_to_show(evidence, eagerness, self.calibration)) == len(answer.text):
            return answer
        if end:
            return replace(answer, text=answer.text[:end], finished=False)
        likely, threshold = best(evidence, self.calibration), self.calibration.thresholds[eagerness]
        by_whom = " (judged by your own calibration)" if self.calibration.source else ""
        detail = (
            f"The suggestion is at best {likely:.0%} likely to be right{by_whom}; "
            f"`eagerness` = {eagerness} requires {threshold:.0%}."
        )
        return Answer(reason=Reason.LOW_CONFIDENCE, detail=detail)

    def _max_new_tokens(self, trigger: Trigger) -> int:
        limit = self.settings.max_new_tokens
        return max(limit, self.settings.max_new_tokens_invoked) if trigger is Trigger.INVOKED else limit

    async def _generate(
        self, request: Request, cursor: CursorContext, on_text: Callable[[str], None]
    ) -> Generation:
        """Return what the model writes up to the suggestion's end, or how it failed."""
        output = Generation()
        try:
            async with asyncio.timeout(self.settings.deadline_s):
                await stream(self.engine, request, cursor, output, on_text)
        except TimeoutError:
            _LOG.warning("no answer within `deadline_s` (%.1f s)", self.settings.deadline_s)
            if output.keep_whole_lines():
                output.detail = (
                    "The suggestion is incomplete: it holds the lines that the model had written "
                    f"within `deadline_s` ({self.settings.deadline_s:g} s)."
                )
            else:
                output.failure = Reason.DEADLINE
        except EngineError as error:
            _LOG.warning("the engine failed: %s", error)
            unavailable = isinstance(error, EngineUnavailableError)
            output.failure = Reason.ENGINE_UNAVAILABLE if unavailable else Reason.ENGINE_ERROR
            output.detail = str(error)
        except Exception as error:
            # Not its message, which may quote the prompt.
            _LOG.error("the engine failed: %s", type(error).__name__)
            output.failure = Reason.ENGINE_ERROR
        return output


def _changed_texts(output: Generation, cleaned: Answer, answer: Answer) -> tuple[tuple[str, str], ...]:
    """Return the texts for `Answer.texts`."""
    texts = [
        # Unsafe characters are not shown here either.
        ("model", output.raw + output.late + "\ufffd" * output.is_cut),
        ("unsafe characters", output.raw + output.late),
        ("deadline", output.raw),
        ("stop rules", output.text),
        ("clean-up", cleaned.text),
        ("confidence", answer.text),
    ]
    return tuple(step for at, step in enumerate(texts) if not at or step[1] != texts[at - 1][1])
