"""Answers from suggestions that exist already: exact, typed through, or the model's text after their end.

Pure but for the pipeline's rules (clean-up, confidence), which it applies again; no model is asked.
"""

from __future__ import annotations

from dataclasses import replace

from midfill.completion.answer import Answer, AnswerSource, Trigger
from midfill.completion.autoclose import reconcile_auto_closed
from midfill.completion.cache import Match
from midfill.completion.pipeline import Pipeline
from midfill.completion.postprocess.cursor_context import CursorContext
from midfill.completion.postprocess.normalization import normalized
from midfill.completion.postprocess.stop import stop
from midfill.completion.reasons import Reason
from midfill.text.documents import Snapshot


def from_cache(match: Match, snapshot: Snapshot, trigger: Trigger, pipeline: Pipeline) -> Answer | None:
    """Return the answer of a cached suggestion at a cursor; None if all of it is typed already."""
    if match.exact:
        source = AnswerSource.PREFETCH if match.suggestion.is_prefetched else AnswerSource.CACHE
        return _exact(match, source, snapshot, trigger, pipeline)
    typed_through = _typed_through(match, AnswerSource.TYPED_THROUGH)
    return typed_through or _continuation(match, snapshot, trigger, pipeline)


def from_joined(match: Match, snapshot: Snapshot, trigger: Trigger, pipeline: Pipeline) -> Answer | None:
    """Return the answer of a joined in-flight completion; None if all of it is typed already."""
    if match.exact or not match.suggestion.computed.lasting:
        return _exact(match, AnswerSource.JOINED, snapshot, trigger, pipeline)
    return _typed_through(match, AnswerSource.JOINED)


def reconciled(answer: Answer, match: Match) -> Answer:
    """Return the origin's answer as it is at the cursor, which auto-closed brackets may follow."""
    if not answer.text or not match.closed:
        return answer
    fit = reconcile_auto_closed(answer.text, match.closed)
    text, num_replaced = fit or ("", 0)
    texts = (*answer.texts, ("auto-closed", text)) if answer.texts and text != answer.text else answer.texts
    if not text.strip():
        reason = Reason.OTHER_CLOSERS if fit is None else Reason.REPEATS_TEXT
        return replace(answer, text="", source=AnswerSource.NONE, reason=reason, texts=texts)
    return replace(answer, text=text, num_replaced=num_replaced, texts=texts)


def _exact(
    match: Match, source: AnswerSource, snapshot: Snapshot, trigger: Trigger, pipeline: Pipeline
) -> Answer:
    cursor = CursorContext.of(snapshot, invoked=trigger is Trigger.INVOKED)
    answer = pipeline.filter_by_confidence(match.suggestion.computed.answer, cursor, trigger)
    answer = reconciled(answer, match)
    return replace(answer, source=source if answer.text else AnswerSource.NONE)


def _typed_through(match: Match, source: AnswerSource) -> Answer | None:
    text, num_replaced = match.remainder
    if not text:
        return None
    return replace(match.suggestion.computed.answer, text=text, num_replaced=num_replaced, source=source)


def _continuation(match: Match, snapshot: Snapshot, trigger: Trigger, pipeline: Pipeline) -> Answer | None:
    """Return the next suggestion from the text that the model wrote after this one's end, if there is one."""
    if not (text := match.continuation):
        return None
    output = match.suggestion.computed.output
    cursor = CursorContext.of(snapshot, invoked=trigger is Trigger.INVOKED)
    if output.is_altered or normalized(text, cursor) != text:
        # The model did not write what the file has now, so it might continue in another way.
        return None
    end = stop(text, cursor)
    if end is None and not output.ended:
        # The text stops before the end of the next suggestion.
        return None
    start = len(match.typed)
    part = output.part(start, None if end is None else start + end)
    answer = pipeline.filter_by_confidence(pipeline.postprocess(part, cursor), cursor, trigger)
    return replace(answer, source=AnswerSource.CONTINUATION) if answer.text else None
