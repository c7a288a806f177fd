"""Answers completion requests: gate > cache > in flight > pipeline > answer.

Knows nothing of LSP: it takes a `Snapshot` and returns an `Answer`. Runs on the event loop. A cancelled
request leaves its in-flight completion, which a newer request can join; one that no request can use any more
closes its token stream, which frees the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from midfill.completion.answer import Answer, Trigger
from midfill.completion.autoclose import AutoClosed
from midfill.completion.cache import SuggestionCache
from midfill.completion.confidence import BUILT_IN, Calibration
from midfill.completion.context.collector import ContextCollector
from midfill.completion.gate import reason_against, reason_against_file
from midfill.completion.idle import IdleTimers
from midfill.completion.in_flight import InFlightCompletions
from midfill.completion.pipeline import Pipeline
from midfill.completion.prompt import PromptBuilder
from midfill.completion.reasons import Reason
from midfill.completion.reuse import from_cache, from_joined, reconciled
from midfill.engine.api import Engine
from midfill.fim.templates import Family
from midfill.settings import Settings
from midfill.text.documents import Document, Snapshot
from midfill.text.secret_watch import SecretWatch


@dataclass(slots=True)
class Completer:
    """Answers completion requests with the present engine.

    Attributes:
        settings: the ones in force; change them by `configure`.
        failure: why there is no engine, once that is known.
        search_s: how long a request waits for the search for secrets in its document, in seconds.
        context: collects pieces of other files.
        adapter_of: returns the adapter for a document; see `Request.adapter`. Set it before `use`, and call
            `drop_work` when it begins to return another one.
        calibration: the weights by which automatic suggestions are judged; set it before `use`.
    """

    settings: Settings
    failure: str | None = None
    search_s: float = 1.0
    adapter_of: Callable[[Document], str | None] = lambda _: None
    calibration: Calibration = BUILT_IN
    context: ContextCollector = field(init=False)
    _pipeline: Pipeline | None = None
    _secrets: SecretWatch = field(default_factory=SecretWatch)
    _cache: SuggestionCache = field(default_factory=SuggestionCache)
    _in_flight: InFlightCompletions = field(init=False)
    _auto_closed: AutoClosed = field(default_factory=AutoClosed)
    _idle: IdleTimers = field(default_factory=IdleTimers)

    def __post_init__(self) -> None:
        self.context = ContextCollector(self.settings, self._secrets)
        self._in_flight = InFlightCompletions(self._cache)

    @property
    def is_ready(self) -> bool:
        """Whether there is a model to ask."""
        return self._pipeline is not None

    def use(self, engine: Engine, family: tuple[str, Family] | None = None) -> None:
        """Serve from a started engine.

        Args:
            engine: the engine.
            family: name and row of the model's FIM template (see `probing.identify`); by default recognised.

        Raises:
            ModelError: the FIM template is not known.
        """
        self._pipeline = self._pipeline_with(engine, self.settings, family)
        self.failure = None
        self.drop_work()

    def configure(self, settings: Settings) -> None:
        """Take new settings. Raises `ModelError`, and keeps the old ones, if no prompt fits into them."""
        if (old := self._pipeline) is not None:
            family = old.prompts.family_name, old.prompts.family
            self._pipeline = self._pipeline_with(old.engine, settings, family)
        if settings != self.settings:
            self.drop_work()
        self.settings = settings
        self.context.configure(settings)

    def fail(self, why: str) -> None:
        """Answer with nothing from now on, because there is no model."""
        self.failure = why
        self._pipeline = None
        self.drop_work()

    def edited(self, document: Document) -> None:
        """Take a changed document: cancel what is being computed for it and contradicts the new text."""
        self._idle.stop()
        self._in_flight.edited(document)

    def computes(self, uri: str) -> bool:
        """Return whether something is being computed for a document, so that `edited` must be called."""
        return self._in_flight.computes(uri)

    def before_auto_close(self, snapshot: Snapshot) -> None:
        """Note the text before a change at the cursor that may auto-close what it opens.

        `autoclose.auto_closing_changes` tells which changes those are.
        """
        self._auto_closed.before_change(snapshot)

    def on_idle(self, snapshot: Snapshot) -> None:
        """If the user pauses at this cursor, let the model read the prompt ahead."""
        self._idle.stop()
        if self.settings.prefetch:
            self._idle.prefill_soon(partial(self._prefill_ahead, snapshot))

    def forget(self, uri: str) -> None:
        """Drop everything about a document that was closed, and cancel what is computed for it."""
        self._secrets.forget(uri)
        self._cache.forget(uri)
        self._auto_closed.forget(uri)
        self._in_flight.forget(uri)
        self.context.closed(uri)
        if self._pipeline is not None:
            self._pipeline.prompts.forget(uri)

    def drop_work(self) -> None:
        """Drop every suggestion, and cancel what is computed without a waiting request."""
        self._idle.stop()
        self._cache.clear()
        self._in_flight.clear()

    async def complete(self, snapshot: Snapshot, trigger: Trigger) -> Answer:
        """Return the answer for one cursor. Never raises for a fault of the model: that is a reason."""
        begun = time.monotonic()
        self._idle.stop()
        if (reason := await self._gate(snapshot, trigger)) is not None:
            return Answer(reason=reason, latency_ms=_since(begun))
        answer = self._from_cache(snapshot, trigger)
        stages = (("gate and reuse", _since(begun)),)
        # Ends: an in-flight completion that contradicts the text is not joined again, and a new one does not.
        while answer is None:
            answer = await self._from_in_flight(snapshot, trigger) or self._from_cache(snapshot, trigger)
        self._prefetch_soon(snapshot, answer)
        text = answer.text.replace("\n", snapshot.line_ending)
        return replace(answer, text=text, latency_ms=_since(begun), stages=stages + answer.stages)

    async def _gate(self, snapshot: Snapshot, trigger: Trigger) -> Reason | None:
        """Return the reason for asking nothing, or None. Waits a moment for the search for secrets."""
        reason = self._reason_against(snapshot, trigger)
        if reason is Reason.SECRET_SEARCH and await self._secrets.wait(snapshot.document, self.search_s):
            reason = self._reason_against(snapshot, trigger)
        if reason is not None or self._pipeline is not None:
            return reason
        return Reason.LOADING if self.failure is None else Reason.MODEL_FAILED

    def reason_against_file(self, document: Document) -> Reason | None:
        """Return the reason for suggesting nothing anywhere in a document, or None."""
        return reason_against_file(document, self.settings, self._secrets)

    def _reason_against(self, snapshot: Snapshot, trigger: Trigger) -> Reason | None:
        return reason_against(snapshot, trigger, self.settings, self._secrets)

    def _from_cache(self, snapshot: Snapshot, trigger: Trigger) -> Answer | None:
        """Return the answer that needs no model: a cached one, or the remainder of a suggestion."""
        if (pipeline := self._pipeline) is None:
            return None
        self._in_flight.moved(snapshot)
        context = self.context.collect(snapshot)
        for match in self._cache.matches(snapshot, explicit=trigger is Trigger.INVOKED):
            # With other context the exact answer might be another one now. What the user is typing stays.
            if match.exact and match.suggestion.computed.context is not context:
                continue
            if (answer := from_cache(match, snapshot, trigger, pipeline)) is not None:
                self._cache.keep(match.suggestion)
                return answer.without_model_work()
        return None

    async def _from_in_flight(self, snapshot: Snapshot, trigger: Trigger) -> Answer | None:
        """Wait for the in-flight completion that agrees with this text, or launch one.

        Returns None if the model's text turned out to contradict what was typed.
        """
        explicit = trigger is Trigger.INVOKED
        if (pipeline := self._pipeline) is None:
            return Answer(reason=Reason.MODEL_FAILED)
        joined = self._in_flight.join(snapshot, explicit=explicit)
        if joined is not None:
            in_flight, inserted = joined
            match = await in_flight.wait(inserted)
            return None if match is None else from_joined(match, snapshot, trigger, pipeline)
        seen, closed = self._auto_closed.without(snapshot)
        launched = self._in_flight.launch(seen, partial(pipeline.compute, seen), explicit=explicit)
        self._auto_closed.remember(launched.origin)
        match = await launched.wait(("", closed))
        return None if match is None else reconciled(match.suggestion.computed.answer, match)

    # Idle work

    def _prefetch_soon(self, snapshot: Snapshot, answer: Answer) -> None:
        """If the user pauses: compute what comes after this answer, and read the prompt ahead."""
        self.on_idle(snapshot)
        if self.settings.prefetch and answer.text:
            text = answer.text.replace("\n", snapshot.line_ending)
            accepted = snapshot.insert(text, answer.num_replaced)
            self._idle.prefetch_soon(partial(self._prefetch, snapshot, accepted))

    def _prefetch(self, snapshot: Snapshot, accepted: Snapshot) -> None:
        """Compute the suggestion after `accepted`, the text if the suggestion in `snapshot` is accepted."""
        pipeline = self._pipeline
        if pipeline is None or self._reason_against(accepted, Trigger.AUTOMATIC) is not None:
            return
        known = self._cache.matches(accepted, explicit=False)
        if any(from_cache(match, accepted, Trigger.AUTOMATIC, pipeline) is not None for match in known):
            return
        if self._in_flight.join(accepted, explicit=False) is not None:
            return
        seen, base = self._auto_closed.without(accepted)[0], self._auto_closed.without(snapshot)[0]
        self._in_flight.launch(seen, partial(pipeline.compute, seen), ahead_of=base)

    def _prefill_ahead(self, snapshot: Snapshot) -> None:
        if self._pipeline is not None and self._reason_against(snapshot, Trigger.INVOKED) is None:
            self._pipeline.prefill_ahead(snapshot)

    def _pipeline_with(
        self, engine: Engine, settings: Settings, family: tuple[str, Family] | None
    ) -> Pipeline:
        prompts = PromptBuilder(engine.model, settings, family)
        return Pipeline(engine, prompts, settings, self.context, self.adapter_of, self.calibration)


def _since(begun: float) -> float:
    return (time.monotonic() - begun) * 1000
