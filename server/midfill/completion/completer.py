"""The pipeline from a snapshot to an answer: gate > reuse > context > prompt > engine > trim > store.

Knows nothing of LSP: it takes a `Snapshot` and returns an `Answer`. Runs on the event loop; the only
thing it waits for is the engine. What the model is asked for is a flight of its own (see `suggestions`),
so that a newer request can go on with it. A cancelled request leaves its flight; a flight that nobody can use
any more closes its token stream, which frees the model.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import Any

from midfill.completion.confidence import BUILT_IN, Calibration, Eagerness, Evidence, best, length_to_show
from midfill.completion.context.collector import ContextBundle, Context
from midfill.completion.generation import Output, stream
from midfill.completion.postprocess.clean import before_unsafe, clean, stop
from midfill.completion.postprocess.cursor_context import Place
from midfill.completion.postprocess.normalization import received
from midfill.completion.prompt import Prompt, PromptBuilder
from midfill.completion.reasons import Reason
from midfill.completion.stats.request_log import stages
from midfill.completion.suggestions import Computed, InFlightCompletion, Match, Suggestions, fitted
from midfill.engine.api import Engine, Request
from midfill.errors import EngineError, EngineUnavailableError
from midfill.fim.templates import Family
from midfill.settings import Settings
from midfill.text.documents import Document, Snapshot
from midfill.text.languages import is_among
from midfill.text.secret_filter import is_excluded
from midfill.text.secret_watch import SecretWatch, Verdict

_LOG = logging.getLogger(__name__)

_CONTINUES_WORD = re.compile(r"\w")
# Behind the cursor may stand what editors insert by themselves: closers, then one separator.
_HARMLESS_TAIL = re.compile(r"""\s*[)>}\]"'`]*\s*[:{;,]?\s*\Z""")
# After an answer the typist may go on at once, and would wait for the forward pass under way.
PREFETCH_DELAY_S = 0.1
# New context makes the whole prompt new, which is worth nothing if the typist goes on meanwhile.
IDLE_DELAY_S = 1.0


class Trigger(StrEnum):
    """Who asked."""

    AUTOMATIC = "automatic"
    INVOKED = "invoked"


class Source(StrEnum):
    """Where an answer comes from."""

    NONE = "none"
    MODEL = "model"
    TYPED_THROUGH = "typed-through"
    """The rest of a suggestion that the user is typing, or has accepted a part of."""
    CACHE = "cache"
    """Computed before, for exactly this text."""
    JOINED = "joined"
    """Was being computed already, and agrees with what has been typed since."""
    CONTINUATION = "streak"
    """What the model had written behind the end of the suggestion before."""
    PREFETCH = "prefetch"
    """Computed as if the suggestion before had been accepted, which it then was."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What to show at the cursor.

    Attributes:
        text: the text to insert at the cursor, with the file's own line ends; "" for nothing.
        num_replaced: characters just behind the cursor whose place the text takes: closers that the editor
            put there, and that the text has too.
        source: where it comes from.
        reason: why there is nothing; None if there is something.
        detail: what there is to say about the reason, or about where the text ends: a sentence, or "".
        latency_ms: from the snapshot to here.
        num_prompt, num_reused, num_generated: tokens.
        segments: the parts of the prompt and their sizes in tokens.
        prompt: what the model read; None if it was not asked. For explaining, like the next two.
        stages: what took how many milliseconds.
        texts: each filter that changed the text, and the text after it; the model's own is first.
        tokens: for each token that the text is made of: where it ends in the text, its log-probability.
        finished: the text came to an end of its own, not to the token limit.
    """

    text: str = ""
    num_replaced: int = 0
    source: Source = Source.NONE
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


# What of an answer tells of the model's work, when it is used again without that.
_NO_MODEL: dict[str, Any] = {
    "num_prompt": 0,
    "num_reused": 0,
    "num_generated": 0,
    "segments": (),
    "prompt": None,
    "stages": (),
    "texts": (),
}


@dataclass(frozen=True, slots=True)
class _Made:
    """What is remembered of an answer: itself, and what it was made from."""

    answer: Answer
    output: Output
    context: ContextBundle


@dataclass(slots=True)
class Completer:
    """Answers completion requests with whatever engine is there.

    Attributes:
        settings: the ones in force; change them by `configure`.
        failure: why there is no engine, once that is known.
        search_s: how long a request waits for its document to be searched for secrets.
        looks_ahead: whether to compute, while the user rests, what comes next if a suggestion is accepted.
        context: what other files contribute.
        adapter_of: tells the adapter that a document is completed with; see `Request.adapter`. When it would
            tell another one, what was suggested has to be dropped (`drop_work`).
        calibration: what suggestions are judged by that nobody asked for; set before `use`.
    """

    settings: Settings
    failure: str | None = None
    search_s: float = 1.0
    looks_ahead: bool = False
    adapter_of: Callable[[Document], str | None] = lambda _: None
    calibration: Calibration = BUILT_IN
    context: Context = field(init=False)
    _engine: Engine | None = None
    _prompts: PromptBuilder | None = None
    _forbidden: tuple[str, ...] = field(default=())
    _secrets: SecretWatch = field(default_factory=SecretWatch)
    _suggestions: Suggestions[_Made] = field(default_factory=Suggestions)
    _rest: asyncio.TimerHandle | None = None
    _renewal: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self.context = Context(self.settings, self._secrets)

    @property
    def is_ready(self) -> bool:
        """Whether there is a model to ask."""
        return self._engine is not None

    def use(self, engine: Engine, family: tuple[str, Family] | None = None) -> None:
        """Serve from a started engine, its model's FIM family recognised or given (see `probing.identify`).

        Raises `ModelError` if the family is not known.
        """
        self._prompts = PromptBuilder(engine.model, self.settings, family)
        self._forbidden = self._prompts.family.never_text
        self._engine = engine
        self.failure = None
        self.drop_work()

    def configure(self, settings: Settings) -> None:
        """Take new settings. Raises `ModelError`, and keeps the old ones, if no prompt fits into them."""
        if self._engine is not None:
            known = self._prompts
            family = None if known is None else (known.family_name, known.family)
            self._prompts = PromptBuilder(self._engine.model, settings, family)
        if settings != self.settings:
            self.drop_work()
        self.settings = settings
        self.context.configure(settings)

    def fail(self, why: str) -> None:
        """Answer with nothing from now on, because there is no model."""
        self.failure = why
        self._engine = None
        self.drop_work()

    def edited(self, document: Document) -> None:
        """A document has changed: what is computed for it ends, unless it agrees with what was typed."""
        self._stop_resting()
        self._suggestions.edited(document)

    def computes(self, uri: str) -> bool:
        """Whether something is being computed for a document, so that `edited` matters."""
        return self._suggestions.computes(uri)

    def closing(self, snapshot: Snapshot) -> None:
        """A change is about to be made here that may close what it opens (`suggestions.auto_closing_changes`)."""
        self._suggestions.closing(snapshot)

    def rest(self, snapshot: Snapshot) -> None:
        """The user may rest here. If so, let the model read what it would be asked, and ask it nothing."""
        self._stop_resting()
        if self.looks_ahead and self.settings.prefetch:
            self._renewal = asyncio.get_running_loop().call_later(IDLE_DELAY_S, self._settle, snapshot)

    def forget(self, uri: str) -> None:
        """Drop what is remembered of a document that was closed."""
        self._secrets.forget(uri)
        self._suggestions.forget(uri)
        self.context.closed(uri)
        if self._prompts is not None:
            self._prompts.forget(uri)

    def drop_work(self) -> None:
        """Drop every suggestion, and what is computed that nobody waits for."""
        self._stop_resting()
        self._suggestions.clear()

    async def complete(self, snapshot: Snapshot, trigger: Trigger) -> Answer:
        """Answer for one cursor. Never raises for a fault of the model: that is a reason."""
        begun = time.monotonic()
        self._stop_resting()
        reason = self.gate(snapshot, trigger)
        if reason is Reason.SECRET_SEARCH and await self._secrets.settled(snapshot.document, self.search_s):
            reason = self.gate(snapshot, trigger)
        if reason is not None:
            return Answer(reason=reason, latency_ms=_since(begun))
        if self._engine is None or self._prompts is None:
            reason = Reason.LOADING if self.failure is None else Reason.MODEL_FAILED
            return Answer(reason=reason, latency_ms=_since(begun))
        answer = self._reuse(snapshot, trigger)
        stages = (("gate and reuse", _since(begun)),)
        while answer is None:
            answer = await self._ask(snapshot, trigger) or self._reuse(snapshot, trigger)
        self._look_ahead(snapshot, answer)
        text = answer.text.replace("\n", snapshot.line_ending)
        return replace(answer, text=text, latency_ms=_since(begun), stages=stages + answer.stages)

    def gate(self, snapshot: Snapshot, trigger: Trigger) -> Reason | None:
        """Whether to ask the model at all: the reason against it, or None."""
        document = snapshot.document
        if not self.settings.enabled:
            return Reason.DISABLED
        if is_among(self.settings.disabled_languages, document.language_id, document.sent_language):
            return Reason.LANGUAGE_OFF
        if is_excluded(document.uri, self.settings.excluded_files):
            return Reason.FILE_EXCLUDED
        if document.num_chars > self.settings.max_file_kb * 1024:
            return Reason.FILE_TOO_LARGE
        if all(not line or line.isspace() for line in document.lines):
            return Reason.EMPTY_FILE
        if self.settings.detect_secrets and (found := self._secrets.verdict(document)) is not Verdict.CLEAN:
            return Reason.SECRET_IN_FILE if found is Verdict.SECRET else Reason.SECRET_SEARCH
        if trigger is Trigger.INVOKED:
            return None
        if _CONTINUES_WORD.match(snapshot.line_after):
            return Reason.MID_WORD
        if not _HARMLESS_TAIL.match(snapshot.line_after):
            return Reason.LINE_TAIL
        return None

    def _reuse(self, snapshot: Snapshot, trigger: Trigger) -> Answer | None:
        """What there is without the model: the rest of a suggestion, or one for exactly this text."""
        self._suggestions.moved(snapshot)
        context = self.context.collect(snapshot)
        for match in self._suggestions.matches(snapshot, explicit=trigger is Trigger.INVOKED):
            # What was computed for exactly this text with other context would be another answer now; what the
            # user is typing through stays.
            if match.exact and match.suggestion.computed.made.context is not context:
                continue
            if (answer := self._continue(match, snapshot, trigger)) is not None:
                self._suggestions.keep(match.suggestion)
                return replace(answer, **_NO_MODEL)
        return None

    def _continue(self, match: Match[_Made], snapshot: Snapshot, trigger: Trigger) -> Answer | None:
        """What a suggestion that still holds has to say here; None if it has come to its end."""
        computed = match.suggestion.computed
        made = computed.made
        if match.exact:
            source = Source.PREFETCH if match.suggestion.ahead else Source.CACHE
            answer = self._weigh(made.answer, Place.of(snapshot, invoked=trigger is Trigger.INVOKED), trigger)
            answer = _beside_closers(answer, match)
            return replace(answer, source=source if answer.text else Source.NONE)
        text, num_replaced = match.rest
        if text:
            return replace(made.answer, text=text, num_replaced=num_replaced, source=Source.TYPED_THROUGH)
        if not (beyond := match.beyond):
            return None
        place = Place.of(snapshot, invoked=trigger is Trigger.INVOKED)
        if made.output.is_altered or received(beyond, place) != beyond:
            # What the model would write after the text as it is now is not known.
            return None
        end = stop(beyond, place)
        if end is None and not made.output.ended:
            # Where this suggestion would end is not known.
            return None
        start = len(match.typed)
        output = made.output.beyond(start, None if end is None else start + end)
        answer = self._weigh(self._trim(output, place), place, trigger)
        return replace(answer, source=Source.CONTINUATION) if answer.text else None

    async def _ask(self, snapshot: Snapshot, trigger: Trigger) -> Answer | None:
        """Join the flight that agrees with this text, or launch one; None if it went another way."""
        explicit = trigger is Trigger.INVOKED
        joined = self._suggestions.join(snapshot, explicit=explicit)
        if joined is None:
            bare, closed = self._suggestions.bare(snapshot)
            flight = self._suggestions.launch(bare, self._work(bare), explicit=explicit)
            match = await flight.wait(("", closed))
            return None if match is None else _beside_closers(match.suggestion.computed.made.answer, match)
        match = await joined[0].wait(joined[1])
        if match is None:
            return None
        computed = match.suggestion.computed
        if match.exact or not computed.lasting:
            place = Place.of(snapshot, invoked=explicit)
            answer = _beside_closers(self._weigh(computed.made.answer, place, trigger), match)
            return replace(answer, source=Source.JOINED if answer.text else Source.NONE)
        text, num_replaced = match.rest
        if not text:
            return None
        return replace(computed.made.answer, text=text, num_replaced=num_replaced, source=Source.JOINED)

    def _look_ahead(self, snapshot: Snapshot, answer: Answer) -> None:
        """When the user rests: compute what comes next if this answer is accepted."""
        self.rest(snapshot)
        if not self.looks_ahead or not self.settings.prefetch or not answer.text:
            return
        text = answer.text.replace("\n", snapshot.line_ending)
        accepted = snapshot.insert(text, answer.num_replaced)
        self._rest = asyncio.get_running_loop().call_later(PREFETCH_DELAY_S, self._prefetch, snapshot, accepted)

    def _prefetch(self, snapshot: Snapshot, accepted: Snapshot) -> None:
        known = self._suggestions.matches(accepted, explicit=False)
        if (
            self._engine is None
            or self.gate(accepted, Trigger.AUTOMATIC) is not None
            or any(self._continue(match, accepted, Trigger.AUTOMATIC) is not None for match in known)
            or self._suggestions.join(accepted, explicit=False) is not None
        ):
            return
        bare = self._suggestions.bare(accepted)[0]
        self._suggestions.launch(bare, self._work(bare), ahead_of=self._suggestions.bare(snapshot)[0])

    def _settle(self, snapshot: Snapshot) -> None:
        """While nobody waits: choose context and anchor anew, and let the model read the prompt they make."""
        if self._engine is None or self._prompts is None or self.gate(snapshot, Trigger.INVOKED) is not None:
            return
        if self.settings.context:
            self.context.renew(snapshot)
        tokens = self._prompts.settle(snapshot, self.context.collect(snapshot)).tokens
        self._engine.prewarm(tokens, self.adapter_of(snapshot.document))

    def _stop_resting(self) -> None:
        for timer in (self._rest, self._renewal):
            if timer is not None:
                timer.cancel()
        self._rest = self._renewal = None

    def _work(self, snapshot: Snapshot) -> Callable[[InFlightCompletion[_Made]], Awaitable[Computed[_Made]]]:
        """The stages that ask the model, with the engine and the settings of this moment."""
        if self._engine is None or self._prompts is None:
            raise AssertionError("work is made where there is an engine")
        return partial(self._compute, self._engine, self._prompts, self.settings, snapshot)

    async def _compute(
        self,
        engine: Engine,
        prompts: PromptBuilder,
        settings: Settings,
        snapshot: Snapshot,
        flight: InFlightCompletion[_Made],
    ) -> Computed[_Made]:
        """Ask the model: context > prompt > engine > trim."""
        begun = time.monotonic()
        context = self.context.collect(snapshot)
        limit = settings.max_new_tokens
        if flight.explicit:
            limit = max(limit, settings.max_new_tokens_invoked)
        prompt = prompts.build(snapshot, context, max_new_tokens=limit)
        trigger = Trigger.INVOKED if flight.explicit else Trigger.AUTOMATIC
        place = Place.of(snapshot, invoked=flight.explicit)
        built = time.monotonic()
        request = Request(
            prompt.tokens,
            prompt.max_new_tokens,
            prompt.stop_ids,
            forced_prefix=prompt.forced_prefix,
            adapter=self.adapter_of(snapshot.document),
        )
        flight.run_as(request)
        output = await self._generate(engine, request, place, flight)
        written = time.monotonic()
        trimmed = self._trim(output, place)
        answer = self._weigh(trimmed, place, trigger)
        # What is not safe to show is not shown here either.
        texts = [("model", output.raw + output.late + "\ufffd" * output.is_cut)]
        texts += [("unsafe characters", output.raw + output.late), ("deadline", output.raw)]
        texts += [("stop rules", output.text)]
        texts += [("clean-up", trimmed.text), ("confidence", answer.text)]
        answer = replace(
            answer,
            num_prompt=len(prompt.tokens),
            num_reused=request.stats.num_reused,
            num_generated=request.stats.num_generated,
            segments=prompt.segments,
            prompt=prompt,
            stages=stages(begun, built, request.stats, written),
            texts=tuple(step for at, step in enumerate(texts) if not at or step[1] != texts[at - 1][1]),
        )
        return Computed(
            answer.text, output.raw, _Made(answer, output, context), lasting=output.failure is None
        )

    async def _generate(
        self, engine: Engine, request: Request, place: Place, flight: InFlightCompletion[_Made]
    ) -> Output:
        """What the model writes, up to where a suggestion ends, or how it failed."""
        output = Output()
        try:
            async with asyncio.timeout(self.settings.deadline_s):
                await stream(engine, request, place, flight, output)
        except TimeoutError:
            _LOG.warning("no answer within %.1f s", self.settings.deadline_s)
            if output.keep_whole_lines():
                output.detail = (
                    f"These are the lines that the model had written when `deadline_s` "
                    f"({self.settings.deadline_s:g} s) was over."
                )
            else:
                output.failure = Reason.DEADLINE
        except EngineError as error:
            _LOG.warning("the engine failed: %s", error)
            unavailable = isinstance(error, EngineUnavailableError)
            output.failure = Reason.ENGINE_UNAVAILABLE if unavailable else Reason.ENGINE_ERROR
            output.detail = str(error)
        except Exception as error:  # noqa: BLE001 - one request fails, whatever a model does
            # Not its message, which may quote the prompt.
            _LOG.error("the engine failed: %s", type(error).__name__)
            output.failure = Reason.ENGINE_ERROR
        return output

    def _trim(self, output: Output, place: Place) -> Answer:
        """What of the model's text is worth inserting."""
        if output.failure is not None:
            return Answer(reason=output.failure, detail=output.detail)
        # All of it: what the model went on with says how the suggestion ends.
        text = output.raw or output.text
        if output.is_cut:
            if not text.strip():
                return Answer(reason=Reason.UNSAFE_CHARACTERS)
            text = before_unsafe(text, place)
        complete = output.complete or output.is_cut
        text, why = clean(text, place, complete=complete, forbidden=self._forbidden)
        if why is not None:
            return Answer(reason=why)
        answer = Answer(text, source=Source.MODEL, tokens=output.within(len(text)), finished=output.complete)
        return replace(answer, detail=output.detail)

    def _weigh(self, answer: Answer, place: Place, trigger: Trigger) -> Answer:
        """Of an answer that nobody asked for explicitly, the lines that are likely enough right."""
        if trigger is Trigger.INVOKED or not answer.text:
            return answer
        evidence = Evidence(answer.text, answer.tokens, answer.finished, place.line_before)
        eagerness = Eagerness(self.settings.eagerness)
        if (end := length_to_show(evidence, eagerness, self.calibration)) == len(answer.text):
            return answer
        if end:
            return replace(answer, text=answer.text[:end], finished=False)
        likely, asked = best(evidence, self.calibration), self.calibration.thresholds[eagerness]
        whose = " by your own calibration" if self.calibration.source else ""
        detail = (
            f"At best {likely:.0%} likely to be right{whose}; `eagerness` = {eagerness} asks for {asked:.0%}."
        )
        return Answer(reason=Reason.LOW_CONFIDENCE, detail=detail)


def _beside_closers(answer: Answer, match: Match[_Made]) -> Answer:
    """An answer for the origin of a match, as it is at the cursor, where closers may stand already."""
    if not answer.text or not match.closed:
        return answer
    fit = fitted(answer.text, match.closed)
    text, num_replaced = fit or ("", 0)
    texts = (*answer.texts, ("auto-closed", text)) if answer.texts and text != answer.text else answer.texts
    if not text.strip():
        reason = Reason.OTHER_CLOSERS if fit is None else Reason.REPEATS_TEXT
        return replace(answer, text="", source=Source.NONE, reason=reason, texts=texts)
    return replace(answer, text=text, num_replaced=num_replaced, texts=texts)


def _since(begun: float) -> float:
    return (time.monotonic() - begun) * 1000
