"""Profile of an engine and of typing sessions: all numbers that `simulation` needs.

Measured by one virtual user who waits for every answer in the sessions of a trace: the tokens to read and to
write for each request, and how long the result agrees with what is typed next. Then several of these prompts
are run at once, to measure the time of a step. Saved as JSON without any text.
"""

from __future__ import annotations

import asyncio
import json
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from midfill.bench.backends import PipelineBackend, SuggestionRequest
from midfill.bench.load import BenchSetup
from midfill.bench.trace import TypingSession
from midfill.completion.answer import Answer
from midfill.completion.origin import HashedText, Origin
from midfill.engine.api import Engine, ModelInfo, Progress, Request, Tokenizer
from midfill.engine.kv_slots import NUM_SLOTS, common_prefix
from midfill.engine.remote.client.remote import RemoteEngine
from midfill.engine.remote.client.shared import SharedEngine
from midfill.errors import MidfillError
from midfill.system.file_errors import why_unreadable, why_unwritable
from midfill.system.json_files import read_json
from midfill.text.documents import Document, Encoding, Snapshot

_VERSION = 2
_ROUNDS = 7
_LEAST_MS = 0.01
_PARALLEL = (1, 2, 4, 8, 16, 32, 64)
_COLD_TOKENS = 64
"""Prompts with at least this many computed tokens are used to measure the prefill speed."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """The capacity and the scheduling policy of an engine.

    Attributes:
        slots: number of prompts in the KV cache.
        sequences: maximum number of requests in one step.
        chunk_tokens: maximum number of tokens in one step.
        newest_first: newest request first, as in midfill's scheduler; otherwise first come, first served.
        knows_idle: whether prefetching yields to requests.
        warms: whether prompts are computed ahead while the user is idle.
        apart: whether the engine is in another process, where that happens only while no request runs.
        parts: number of parts of a step, between which a step that is not needed any more is aborted.
    """

    slots: int
    sequences: int
    chunk_tokens: int
    newest_first: bool = False
    knows_idle: bool = False
    warms: bool = False
    apart: bool = False
    parts: int = 1


CAPACITIES = {
    "midfill, cpu": Capacity(
        NUM_SLOTS, NUM_SLOTS, 64, newest_first=True, knows_idle=True, warms=True, parts=6
    ),
    "midfill, cuda": Capacity(NUM_SLOTS, NUM_SLOTS, 512, newest_first=True, knows_idle=True, warms=True),
    "scripted": Capacity(64, 1, 1_000_000, knows_idle=True),
    # The defaults of these servers; edit the saved profile if a server was started with other values.
    "vLLM": Capacity(1024, 256, 2048),
    "llama.cpp": Capacity(4, 4, 512),
}
_OTHERS = "vLLM"


@dataclass(frozen=True, slots=True)
class CompletionCost:
    """A request for which the model ran, and its cost.

    Attributes:
        num_prompt: tokens of the prompt.
        num_same: leading tokens that are equal to those of the previous prompt.
        steps: decoding steps after the first token.
        held: steps, including that of the first token, that only repeat the held-back end of the prompt.
        chars: characters that the model wrote.
        shown: characters of the suggestion; 0 for none.
        follow: for each later key: characters typed since, and how many of them, from the first on, equal the
            model's text; -1 if the text has changed elsewhere. The last entry holds for all later keys.
    """

    num_prompt: int
    num_same: int
    steps: int
    held: int
    chars: int
    shown: int
    follow: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class SessionProfile:
    """A typing session in numbers.

    Attributes:
        keys: for each key, seconds since the previous one, and seconds until a request, or None without one.
        rest_s: seconds from the last key to the end.
        costs: requests for which the model ran, by index of the key.
        covered: keys answered without the model, each with the key whose result was reused.
    """

    keys: tuple[tuple[float, float | None], ...]
    rest_s: float
    costs: dict[int, CompletionCost]
    covered: dict[int, int]


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """Times of an engine, and the typing sessions that were used to measure them.

    Attributes:
        engine: name of the model.
        where: server, device and number format.
        capacity: capacity and scheduling policy.
        step_ms: (requests in a step, milliseconds of a decoding step), ascending.
        begin_ms: milliseconds before the first step of a request, for engines that run one at a time.
        prefill_ms_per_token: milliseconds per token of a step beyond one per request.
        overhead_ms: milliseconds of a request with the model, apart from its steps.
        reuse_ms: milliseconds of a request without the model.
        deadline_s: a request that takes longer fails.
        sessions: the typing sessions.
    """

    engine: str
    where: str
    capacity: Capacity
    step_ms: tuple[tuple[int, float], ...]
    begin_ms: float
    prefill_ms_per_token: float
    overhead_ms: float
    reuse_ms: float
    deadline_s: float
    sessions: tuple[SessionProfile, ...]

    def step_s(self, sequences: int, tokens: int) -> float:
        """Return the seconds of a step, by linear interpolation and extrapolation of the measurements."""
        table = self.step_ms
        at = min(max(bisect_left(table, (sequences, 0.0)), 1), len(table) - 1)
        if len(table) == 1:
            decode = table[0][1]
        else:
            (low, low_ms), (high, high_ms) = table[at - 1], table[at]
            decode = low_ms + (high_ms - low_ms) * (sequences - low) / (high - low)
        return (decode + self.prefill_ms_per_token * (tokens - sequences)) / 1000

    def write(self, path: Path) -> None:
        """Write the profile as JSON. Raises `MidfillError`."""
        try:
            path.write_text(json.dumps({"version": _VERSION} | asdict(self)), encoding="utf-8")
        except OSError as error:
            raise MidfillError(f"Cannot write {path}: {why_unwritable(error)}.") from error

    @staticmethod
    def read(path: Path) -> EngineProfile:
        """Read a profile that `write` has written. Raises `MidfillError`."""
        try:
            values = read_json(path)
            if (version := values.pop("version")) != _VERSION:
                raise MidfillError(
                    f"{path} has version {version} instead of {_VERSION}. Measure again with --save-service."
                )
            sessions = tuple(_session_profile(session) for session in values.pop("sessions"))
            steps = tuple((int(count), float(ms)) for count, ms in values.pop("step_ms"))
            if not steps or not any(session.costs for session in sessions):
                raise MidfillError(f"{path} has no measurements. Measure again with --save-service.")
            capacity = Capacity(**values.pop("capacity"))
            return EngineProfile(capacity=capacity, step_ms=steps, sessions=sessions, **values)
        except OSError as error:
            raise MidfillError(f"Cannot read {path}: {why_unreadable(error)}.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MidfillError(
                f"{path} was not written by `midfill bench load --save-service`, or is damaged."
            ) from error


def _session_profile(values: dict[str, Any]) -> SessionProfile:
    costs = {
        int(key): CompletionCost(**(cost | {"follow": tuple((d, same) for d, same in cost["follow"])}))
        for key, cost in values["costs"].items()
    }
    covered = {int(key): int(of) for key, of in values["covered"].items()}
    return SessionProfile(
        tuple((gap, after) for gap, after in values["keys"]), values["rest_s"], costs, covered
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    """One answer of the model: tokens read; milliseconds to the first token, of decoding, in total."""

    num_read: int
    first_ms: float
    decode_ms: float
    waited_ms: float = 0.0


@dataclass(slots=True)
class _Notes:
    """Measurements so far."""

    sessions: list[tuple[TypingSession, dict[int, tuple[CompletionCost, _Seen]], dict[int, int]]] = field(
        default_factory=list
    )
    reuse_ms: list[float] = field(default_factory=list)
    prompts: list[tuple[int, ...]] = field(default_factory=list)


async def profile_engine(setup: BenchSetup, report: Progress) -> EngineProfile:
    """Measure an engine that has no other users. Raises `MidfillError` if no request needs the model."""
    pipeline = setup.pipeline(prefetch=False)
    notes = _Notes()
    for number, session in enumerate(setup.sessions):
        report("measuring each request", number / len(setup.sessions))
        await _look(pipeline, setup.engine.model.tokenizer, session, notes)
    await pipeline.end()
    if not notes.prompts:
        raise MidfillError(
            "No request of the trace needed the model. Is completion switched off for its language?"
        )
    model = setup.engine.model
    # Only an engine in this process can be told to compute prompts ahead while other requests run.
    apart = isinstance(setup.engine, (RemoteEngine, SharedEngine))
    capacity = replace(CAPACITIES[kind_of(model)], apart=apart)
    report("measuring steps", None)
    steps = tuple([step async for step in _steps(setup.engine, notes.prompts, capacity)])
    begin_ms = 0.0
    if capacity.sequences == 1:
        begin_ms = max(0.0, await _turn_ms(setup.engine, notes.prompts[-1]) - steps[0][1])
    found = EngineProfile(
        engine=model.name,
        where=f"{model.served_by or 'midfill'}, {model.device}, {model.dtype}",
        capacity=capacity,
        step_ms=steps,
        begin_ms=round(begin_ms, 3),
        prefill_ms_per_token=0.0,
        overhead_ms=0.0,
        reuse_ms=0.0,
        deadline_s=setup.settings.deadline_s,
        sessions=(),
    )
    return _fit(notes, found)


def kind_of(model: ModelInfo) -> str:
    """Return the key of a model's engine in `CAPACITIES`."""
    if model.name == "scripted":
        return "scripted"
    if not model.served_by:
        return "midfill, cuda" if model.device.startswith("cuda") else "midfill, cpu"
    return next((kind for kind in CAPACITIES if kind.lower() in model.served_by.lower()), _OTHERS)


async def _look(
    pipeline: PipelineBackend, tokenizer: Tokenizer, session: TypingSession, notes: _Notes
) -> None:
    """Type a session, waiting for every answer."""
    documents = [Document.open(session.uri, session.language_id, 1, session.text), *session.documents()]
    pipeline.open(documents[0])
    costs: dict[int, tuple[CompletionCost, _Seen]] = {}
    covered: dict[int, int] = {}
    prompt: tuple[int, ...] = ()
    for index, key in enumerate(session.keys):
        document = documents[index + 1]
        pipeline.change(document, key.changes)
        if not _asks(session, index):
            continue
        asked_s = time.monotonic()
        await pipeline.ask(SuggestionRequest(0, asked_s), document, key.cursor)
        waited_ms = (time.monotonic() - asked_s) * 1000
        if (answer := pipeline.answer) is None:
            continue
        if answer.prompt is None:
            notes.reuse_ms.append(waited_ms)
            if answer.text and costs:
                covered[index] = _cover(costs, index)
            continue
        snapshot = Snapshot(document, document.point(key.cursor, Encoding.UTF16))
        follow = _follow(answer, snapshot, documents[index + 2 :])
        cost, seen = _cost(answer, prompt, follow, tokenizer)
        seen = replace(seen, waited_ms=waited_ms)
        costs[index] = cost, seen
        prompt = answer.prompt.tokens
        notes.prompts.append(prompt)
        # Usually the engine has begun another step for the request that has just ended. Wait for it, so that
        # it does not delay the next request: nobody types that fast. A step never takes longer than the first
        # token did.
        await asyncio.sleep(seen.first_ms / 1000)
    notes.sessions.append((session, costs, covered))
    await pipeline.close(documents[-1])


def _cover(costs: Mapping[int, tuple[CompletionCost, _Seen]], index: int) -> int:
    """Return the latest key whose suggestion agrees with the text at a key; without one, the latest."""
    for key in sorted(costs, reverse=True):
        follow = costs[key][0].follow
        if index - key <= len(follow) and follow[index - key - 1][0] == follow[index - key - 1][1]:
            return key
    return max(costs)


def _asks(session: TypingSession, index: int) -> bool:
    """Return whether a suggestion is requested before the next key."""
    after_s = session.keys[index].request_after_s
    last = index + 1 == len(session.keys)
    return after_s is not None and after_s < (session.rest_s if last else session.keys[index + 1].gap_s)


def _cost(
    answer: Answer, before: tuple[int, ...], follow: tuple[tuple[int, int], ...], tokenizer: Tokenizer
) -> tuple[CompletionCost, _Seen]:
    stages = dict(answer.stages)
    tokens, text = (
        (answer.prompt.tokens, answer.prompt.forced_prefix) if answer.prompt is not None else ((), "")
    )
    held = len(tokenizer.encode(text))
    # Usually the last held-back token continues after the cursor; a single character cannot.
    held -= 0 < held < len(text)
    same = common_prefix(before, tokens)
    # Use the engine's report of reused tokens; without one, the common prefix.
    num_read = len(tokens) - (answer.num_reused or same)
    raw = answer.texts[0][1] if answer.texts else ""
    first_ms = stages.get("queue", 0.0) + stages.get("prefill", 0.0)
    seen = _Seen(num_read, first_ms, stages.get("decode", 0.0))
    return CompletionCost(len(tokens), same, 0, held, len(raw), len(answer.text), follow), seen


def _follow(answer: Answer, snapshot: Snapshot, later: Sequence[Document]) -> tuple[tuple[int, int], ...]:
    """Return `CompletionCost.follow` of an answer."""
    raw = answer.texts[0][1] if answer.texts else ""
    origin = Origin.of(snapshot)
    found: list[tuple[int, int]] = []
    agreed = 0
    for document in later:
        inserted = origin.inserted(HashedText(document))
        if inserted is None:
            found.append((0, -1))
            continue
        typed = inserted[0]
        found.append((len(typed), _num_same(typed, raw)))
        if found[-1][0] == found[-1][1]:
            agreed = len(found)
    return tuple(found[: agreed + 1])


def _num_same(one: str, other: str) -> int:
    return next(
        (at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )


async def _steps(
    engine: Engine, prompts: Sequence[tuple[int, ...]], capacity: Capacity
) -> AsyncIterator[tuple[int, float]]:
    """Iterate over (parallel requests, milliseconds of a step), up to the engine's capacity."""
    different = list({prompt[:_COLD_TOKENS]: prompt for prompt in prompts}.values())
    best = 0.0
    for count in _PARALLEL:
        if count > capacity.sequences or count > len(different):
            return
        rounds = []
        for number in range(_ROUNDS):
            # Use other prompts each time: speculative decoding may guess an output that it has seen.
            chosen = [different[(number * count + at) % len(different)] for at in range(count)]
            rounds.append(await _step_ms(engine, chosen, number))
        ms = max(median(rounds), _LEAST_MS)
        yield count, round(ms, 3)
        if count / ms < best * 1.05:
            return
        best = count / ms


async def _step_ms(engine: Engine, prompts: Sequence[tuple[int, ...]], number: int) -> float:
    """Return the milliseconds of a step: the difference between outputs of two tokens and of one.

    Measured to the end of the output, since tokens from another process may arrive together. The prompts are
    reversed, and have one more token each time, so that speculative decoding finds nothing to copy.
    """
    backwards = [tuple(reversed(prompt))[number:] for prompt in prompts]
    seconds = []
    for num_left, num_new in ((2, 1), (1, 1), (0, 2)):
        begun = time.monotonic()
        streams = await asyncio.gather(
            *(_stamps(engine, one[: len(one) - num_left], num_new) for one in backwards)
        )
        seconds.append(max((times[-1] for times in streams if times), default=begun) - begun)
    return max(0.0, seconds[2] - seconds[1]) * 1000


async def _stamps(engine: Engine, prompt: tuple[int, ...], num_new: int) -> list[float]:
    async with aclosing(engine.generate(Request(prompt, num_new))) as tokens:
        return [time.monotonic() async for _ in tokens]


async def _turn_ms(engine: Engine, prompt: tuple[int, ...]) -> float:
    """Return the milliseconds between the tokens of two requests to an engine that runs one at a time."""
    found = []
    for _ in range(_ROUNDS):
        first, second = await asyncio.gather(*(_stamps(engine, prompt, 1) for _ in range(2)))
        if first and second:
            found.append(abs(second[0] - first[0]) * 1000)
    return median(found) if found else 0.0


def _fit(notes: _Notes, profile: EngineProfile) -> EngineProfile:
    """Complete a profile with prefill speed and overheads, derived from the measured requests."""
    seen = [one for _, costs, _ in notes.sessions for _, one in costs.values()]
    step_ms = profile.step_ms[0][1]

    def passes(one: _Seen) -> int:
        return -(-max(one.num_read, 1) // profile.capacity.chunk_tokens)

    def beside(one: _Seen, prefill_ms: float) -> float:
        taken = passes(one) * step_ms + prefill_ms * max(0, one.num_read - passes(one))
        return one.first_ms - profile.begin_ms - taken

    cold = [one for one in seen if one.num_read >= _COLD_TOKENS]
    warm = [one for one in seen if one.num_read < _COLD_TOKENS]
    prefill_ms = 0.0
    overhead_ms = median([beside(one, 0.0) for one in warm or seen])
    if cold and warm:
        prefill_ms = max(
            0.0, median([(beside(one, 0.0) - overhead_ms) / (one.num_read - passes(one)) for one in cold])
        )
        overhead_ms = median([beside(one, prefill_ms) for one in warm])
    around_ms = median([one.waited_ms - one.first_ms - one.decode_ms for one in seen])
    sessions = tuple(
        SessionProfile(
            tuple((key.gap_s, key.request_after_s) for key in session.keys),
            session.rest_s,
            {key: replace(cost, steps=round(one.decode_ms / step_ms)) for key, (cost, one) in costs.items()},
            covered,
        )
        for session, costs, covered in notes.sessions
    )
    return replace(
        profile,
        prefill_ms_per_token=round(prefill_ms, 4),
        overhead_ms=round(max(0.0, overhead_ms) + around_ms, 3),
        reuse_ms=round(median(notes.reuse_ms or [around_ms]), 3),
        sessions=sessions,
    )
