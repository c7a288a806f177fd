"""What an engine takes and what typists ask of it, in numbers: all that `simulation` needs.

Measured by one typist who waits for every answer, over the episodes of a trace: what the model had to
read and to write at each place, and what of that holds when the typing goes on. And by prompts of
these places several at a time: how long a step takes. Kept as JSON without any text.
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

from midfill.bench.backends import Asked, PipelineBackend
from midfill.bench.load import Stage
from midfill.bench.trace import Episode
from midfill.completion.completer import Answer
from midfill.completion.suggestions import Origin, Text
from midfill.engine.api import Engine, ModelInfo, Progress, Request, Tokenizer
from midfill.engine.kv_slots import NUM_SLOTS, common_prefix
from midfill.engine.remote.client.remote import RemoteEngine
from midfill.engine.remote.client.shared import SharedEngine
from midfill.errors import MidfillError
from midfill.system.json_files import read_json
from midfill.text.documents import Document, Encoding, Snapshot

_VERSION = 1
_ROUNDS = 7
_LEAST_MS = 0.01
_PARALLEL = (1, 2, 4, 8, 16, 32, 64)
_COLD_TOKENS = 64
"""A prompt of which so many tokens had to be computed tells what reading takes."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """How an engine shares itself out.

    Attributes:
        slots: documents whose prompts stay computed.
        sequences: the most requests in one step.
        chunk_tokens: the most tokens in one step.
        newest_first: as midfill's own scheduler; else who came first, to the end.
        knows_idle: whether work ahead of its time stands aside for requests.
        warms: whether prompts are computed while nobody waits; of an engine in another process, only where
            nothing at all is under way (`apart`).
        parts: of a step, which can be left between two of them if nobody waits for it.
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
    # The server's own defaults; a file of measurements may be edited where it was started with others.
    "vLLM": Capacity(1024, 256, 2048),
    "llama.cpp": Capacity(4, 4, 512),
}
_OTHERS = "vLLM"


@dataclass(frozen=True, slots=True)
class Place:
    """A request that the model had to answer, and what it took.

    Attributes:
        num_prompt: tokens of the prompt.
        num_same: of these, how many are those of the prompt at the place before.
        steps: of decoding, after the first token.
        held: steps, that of the first token included, that only repeat what was held back from the prompt.
        chars: that it wrote.
        shown: characters of the suggestion; 0 for none.
        follow: for each key after it, how many characters stand there then, and how many of them, from the
            first on, are what the model wrote; -1 where the text has changed elsewhere. The last one stands
            for all that follow.
    """

    num_prompt: int
    num_same: int
    steps: int
    held: int
    chars: int
    shown: int
    follow: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Typed:
    """An episode in numbers.

    Attributes:
        keys: for each, seconds since the one before, and seconds until a suggestion is asked for; None if
            it is not.
        rest_s: see `trace.Episode`.
        places: by key.
        covered: keys at which nothing had to be computed, by the key whose place served for it.
    """

    keys: tuple[tuple[float, float | None], ...]
    rest_s: float
    places: dict[int, Place]
    covered: dict[int, int]


@dataclass(frozen=True, slots=True)
class Service:
    """What an engine takes, and what it is asked.

    Attributes:
        engine: its model; `where`: what runs it.
        step_ms: (requests in a step, milliseconds of it), of decoding, in ascending order.
        begin_ms: before the first step of a request, of an engine that has one at a time.
        prefill_ms_per_token: for each token of a step beyond one for each request.
        overhead_ms: of a request that goes to the model, beside its steps.
        reuse_ms: of one that does not.
        deadline_s: a request that takes longer fails.
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
    episodes: tuple[Typed, ...]

    def step_s(self, sequences: int, tokens: int) -> float:
        """Seconds of a step; between what was measured, and beyond, on straight lines."""
        table = self.step_ms
        at = min(max(bisect_left(table, (sequences, 0.0)), 1), len(table) - 1)
        if len(table) == 1:
            decode = table[0][1]
        else:
            (low, low_ms), (high, high_ms) = table[at - 1], table[at]
            decode = low_ms + (high_ms - low_ms) * (sequences - low) / (high - low)
        return (decode + self.prefill_ms_per_token * (tokens - sequences)) / 1000

    def write(self, path: Path) -> None:
        """As JSON. Raises `MidfillError`."""
        try:
            path.write_text(json.dumps({"version": _VERSION} | asdict(self)), encoding="utf-8")
        except OSError as error:
            raise MidfillError(f"Cannot write {path}: {error.strerror}.") from error

    @staticmethod
    def read(path: Path) -> Service:
        """What `write` wrote. Raises `MidfillError`."""
        try:
            values = read_json(path)
            if (version := values.pop("version")) != _VERSION:
                raise MidfillError(f"{path} is of version {version}; measure again (--save-service).")
            episodes = tuple(_typed(episode) for episode in values.pop("episodes"))
            steps = tuple((int(count), float(ms)) for count, ms in values.pop("step_ms"))
            if not steps or not any(episode.places for episode in episodes):
                raise MidfillError(f"{path} has no measurements; measure again (--save-service).")
            capacity = Capacity(**values.pop("capacity"))
            return Service(capacity=capacity, step_ms=steps, episodes=episodes, **values)
        except OSError as error:
            raise MidfillError(f"Cannot read {path}: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MidfillError(f"{path} is no file of `midfill bench load --save-service`.") from error


def _typed(values: dict[str, Any]) -> Typed:
    places = {
        int(key): Place(**(place | {"follow": tuple((d, same) for d, same in place["follow"])}))
        for key, place in values["places"].items()
    }
    covered = {int(key): int(of) for key, of in values["covered"].items()}
    return Typed(tuple((gap, after) for gap, after in values["keys"]), values["rest_s"], places, covered)


@dataclass(frozen=True, slots=True)
class _Seen:
    """One answer of the model: tokens read, milliseconds to the first one written, of decoding, in all."""

    num_read: int
    first_ms: float
    decode_ms: float
    waited_ms: float = 0.0


@dataclass(slots=True)
class _Notes:
    """What the survey has found so far."""

    typed: list[tuple[Episode, dict[int, tuple[Place, _Seen]], dict[int, int]]] = field(default_factory=list)
    reuse_ms: list[float] = field(default_factory=list)
    prompts: list[tuple[int, ...]] = field(default_factory=list)


async def survey(stage: Stage, report: Progress) -> Service:
    """Measure an engine that nobody else uses. Raises `MidfillError` if the model is never asked."""
    pipeline = stage.pipeline(looks_ahead=False)
    notes = _Notes()
    for number, episode in enumerate(stage.episodes):
        report("measuring each place", number / len(stage.episodes))
        await _look(pipeline, stage.engine.model.tokenizer, episode, notes)
    await pipeline.end()
    if not notes.prompts:
        raise MidfillError("The model was asked nothing: is the trace of a language that is switched off?")
    model = stage.engine.model
    # What one client cannot tell: an engine in this process has a thread of its own for this.
    apart = isinstance(stage.engine, (RemoteEngine, SharedEngine))
    capacity = replace(CAPACITIES[kind_of(model)], apart=apart)
    report("measuring steps", None)
    steps = tuple([step async for step in _steps(stage.engine, notes.prompts, capacity)])
    begin_ms = 0.0
    if capacity.sequences == 1:
        begin_ms = max(0.0, await _turn_ms(stage.engine, notes.prompts[-1]) - steps[0][1])
    found = Service(
        engine=model.name,
        where=f"{model.served_by or 'midfill'}, {model.device}, {model.dtype}",
        capacity=capacity,
        step_ms=steps,
        begin_ms=round(begin_ms, 3),
        prefill_ms_per_token=0.0,
        overhead_ms=0.0,
        reuse_ms=0.0,
        deadline_s=stage.settings.deadline_s,
        episodes=(),
    )
    return _fit(notes, found)


def kind_of(model: ModelInfo) -> str:
    """The row of `CAPACITIES`."""
    if model.name == "scripted":
        return "scripted"
    if not model.served_by:
        return "midfill, cuda" if model.device.startswith("cuda") else "midfill, cpu"
    return next((kind for kind in CAPACITIES if kind.lower() in model.served_by.lower()), _OTHERS)


async def _look(pipeline: PipelineBackend, tokenizer: Tokenizer, episode: Episode, notes: _Notes) -> None:
    """Type an episode, waiting for every answer."""
    documents = [Document.open(episode.uri, episode.language_id, 1, episode.text), *episode.documents()]
    pipeline.open(documents[0])
    places: dict[int, tuple[Place, _Seen]] = {}
    covered: dict[int, int] = {}
    prompt: tuple[int, ...] = ()
    for index, key in enumerate(episode.keys):
        document = documents[index + 1]
        pipeline.change(document, key.changes)
        if not _asks(episode, index):
            continue
        asked_s = time.monotonic()
        await pipeline.ask(Asked(0, asked_s), document, key.cursor)
        waited_ms = (time.monotonic() - asked_s) * 1000
        if (answer := pipeline.answer) is None:
            continue
        if answer.prompt is None:
            notes.reuse_ms.append(waited_ms)
            if answer.text and places:
                covered[index] = _cover(places, index)
            continue
        snapshot = Snapshot(document, document.point(key.cursor, Encoding.UTF16))
        follow = _follow(answer, snapshot, documents[index + 2 :])
        place, seen = _place(answer, prompt, follow, tokenizer)
        seen = replace(seen, waited_ms=waited_ms)
        places[index] = place, seen
        prompt = answer.prompt.tokens
        notes.prompts.append(prompt)
        # As a rule the engine has begun another step for what has just ended, and the next request must not
        # wait for that: no typist is so quick. A step never takes longer than the first token did.
        await asyncio.sleep(seen.first_ms / 1000)
    notes.typed.append((episode, places, covered))
    await pipeline.close(documents[-1])


def _cover(places: Mapping[int, tuple[Place, _Seen]], index: int) -> int:
    """The newest place whose suggestion the text goes along with at a key; else the newest."""
    for key in sorted(places, reverse=True):
        follow = places[key][0].follow
        if index - key <= len(follow) and follow[index - key - 1][0] == follow[index - key - 1][1]:
            return key
    return max(places)


def _asks(episode: Episode, index: int) -> bool:
    """Whether a suggestion is asked for before the next key."""
    after_s = episode.keys[index].request_after_s
    last = index + 1 == len(episode.keys)
    return after_s is not None and after_s < (episode.rest_s if last else episode.keys[index + 1].gap_s)


def _place(
    answer: Answer, before: tuple[int, ...], follow: tuple[tuple[int, int], ...], tokenizer: Tokenizer
) -> tuple[Place, _Seen]:
    stages = dict(answer.stages)
    tokens, text = (
        (answer.prompt.tokens, answer.prompt.forced_prefix) if answer.prompt is not None else ((), "")
    )
    held = len(tokenizer.encode(text))
    # As a rule the last token of what was held back goes on behind the cursor; a character cannot.
    held -= 0 < held < len(text)
    same = common_prefix(before, tokens)
    # Where the engine tells what it had computed before, that counts; else the same prompt does.
    num_read = len(tokens) - (answer.num_reused or same)
    raw = answer.texts[0][1] if answer.texts else ""
    first_ms = stages.get("queue", 0.0) + stages.get("prefill", 0.0)
    seen = _Seen(num_read, first_ms, stages.get("decode", 0.0))
    return Place(len(tokens), same, 0, held, len(raw), len(answer.text), follow), seen


def _follow(answer: Answer, snapshot: Snapshot, later: Sequence[Document]) -> tuple[tuple[int, int], ...]:
    """See `Place.follow`."""
    raw = answer.texts[0][1] if answer.texts else ""
    origin = Origin.of(snapshot)
    found: list[tuple[int, int]] = []
    agreed = 0
    for document in later:
        inserted = origin.inserted(Text(document))
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
    """(requests at once, milliseconds of a step), up to what the engine takes at once."""
    different = list({prompt[:_COLD_TOKENS]: prompt for prompt in prompts}.values())
    best = 0.0
    for count in _PARALLEL:
        if count > capacity.sequences or count > len(different):
            return
        rounds = []
        for number in range(_ROUNDS):
            # Other prompts each time: an engine may guess an output that it has seen.
            chosen = [different[(number * count + at) % len(different)] for at in range(count)]
            rounds.append(await _step_ms(engine, chosen, number))
        ms = max(median(rounds), _LEAST_MS)
        yield count, round(ms, 3)
        if count / ms < best * 1.05:
            return
        best = count / ms


async def _step_ms(engine: Engine, prompts: Sequence[tuple[int, ...]], number: int) -> float:
    """How much longer outputs of two tokens take than of one: a step.

    To the end of the output, since what comes from another process may come together. The prompts are read
    backwards, and each time with a token more, so that an engine that guesses has nothing to guess by.
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
    """How much later the second of two requests gets its only token, where they take turns."""
    found = []
    for _ in range(_ROUNDS):
        first, second = await asyncio.gather(*(_stamps(engine, prompt, 1) for _ in range(2)))
        if first and second:
            found.append(abs(second[0] - first[0]) * 1000)
    return median(found) if found else 0.0


def _fit(notes: _Notes, service: Service) -> Service:
    """The rest of it, from what the survey has seen: what reading takes, and what is beside the steps."""
    seen = [one for _, places, _ in notes.typed for _, one in places.values()]
    step_ms = service.step_ms[0][1]

    def passes(one: _Seen) -> int:
        return -(-max(one.num_read, 1) // service.capacity.chunk_tokens)

    def beside(one: _Seen, prefill_ms: float) -> float:
        taken = passes(one) * step_ms + prefill_ms * max(0, one.num_read - passes(one))
        return one.first_ms - service.begin_ms - taken

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
    episodes = tuple(
        Typed(
            tuple((key.gap_s, key.request_after_s) for key in episode.keys),
            episode.rest_s,
            {
                key: replace(place, steps=round(one.decode_ms / step_ms))
                for key, (place, one) in places.items()
            },
            covered,
        )
        for episode, places, covered in notes.typed
    )
    return replace(
        service,
        prefill_ms_per_token=round(prefill_ms, 4),
        overhead_ms=round(max(0.0, overhead_ms) + around_ms, 3),
        reuse_ms=round(median(notes.reuse_ms or [around_ms]), 3),
        episodes=episodes,
    )
