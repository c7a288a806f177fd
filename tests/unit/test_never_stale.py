"""No answer is ever stale: random sessions against a model that is a pure function of the text.

Every answer must be what a pipeline without a past gives for the same text; or the rest of such an answer for
the text without the last keys before the cursor, and without closers that the editor put behind it. To
accept it then leads to the same text, but for those of the closers that it does not have itself.
"""

import asyncio
import random
import re
import zlib
from dataclasses import dataclass, field

import virtual_time
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from midfill.completion.answer import AnswerSource, Trigger
from midfill.completion.autoclose import matched_closer_offsets
from midfill.completion.completer import Completer
from midfill.engine.api import ModelInfo, Token
from midfill.engine.scripted import CharTokenizer
from midfill.settings import Settings
from midfill.text.documents import Change, Document, Encoding, Point, Snapshot
from profiles import examples

ALPHABET = "aabc ()'{}\n\n \0"
CLOSERS = {"(": ")", "'": "'", "{": "}"}
ADDED = "".join(CLOSERS.values())
MAX_TYPED = 60
# Without healing: the characters held back count as new tokens, so that less comes after them.
SETTINGS = (Settings(max_new_tokens=120), Settings(max_new_tokens=10, healing=False))


class PureEngine:
    """Writes, character by character, what is a function of the text near the cursor and at both of its ends.

    \0 is the end.
    """

    model = ModelInfo("pure", "qwen2.5-coder", "qwen2", 100_000, CharTokenizer(), "cpu", "script")

    def __init__(self, seed, delay_s):
        self.seed = seed
        self.delay_s = delay_s
        self.runs = 0

    async def generate(self, request):
        self.runs += 1
        _, *parts = re.split(r"(<\|fim_\w+\|>)", self.model.tokenizer.decode(request.tokens))
        found = dict(zip(parts[::2], parts[1::2], strict=True))
        text = found["<|fim_prefix|>"] + found["<|fim_middle|>"]
        below = found["<|fim_suffix|>"]
        held = request.forced_prefix
        for index in range(request.max_new_tokens):
            char = held[index] if index < len(held) else self.after(text, below)
            if char == "\0":
                return
            await asyncio.sleep(self.delay_s)
            text += char
            request.stats.num_generated += 1
            yield Token(ord(char), char, -0.1)

    def after(self, text, below):
        # Closers just behind the cursor are in the prompt or not: see `prompt.PromptBuilder`.
        seen = f"{self.seed} {text[:3]} {text[-8:]} {below.lstrip(ADDED)[-4:]}"
        return ALPHABET[zlib.crc32(seen.encode()) % len(ALPHABET)]

    def prewarm(self, tokens):
        pass

    async def close(self):
        pass


@dataclass
class Session:
    """What is open in an editor, and what has been asked."""

    engine: PureEngine
    completer: Completer
    states: dict[str, list[Snapshot]]
    uri: str
    shown: str = ""
    num_replaced: int = 0
    num_replacing: int = 0
    pending: list = field(default_factory=list)
    fresh: dict = field(default_factory=dict)
    sources: list = field(default_factory=list)

    @property
    def here(self):
        return self.states[self.uri][-1]

    def put(self, snapshot):
        self.states[self.uri].append(snapshot)
        self.completer.edited(snapshot.document)

    def type(self, char):
        char = char.replace("\n", self.here.document.line_ending)
        closer = CLOSERS.get(char, "")
        if closer:
            self.completer.before_auto_close(self.here)
        typed = self.here.insert(char)
        self.put(Snapshot(typed.insert(closer).document, typed.cursor))
        self.shown = self.shown.removeprefix(char) if self.shown.startswith(char) else ""

    def accept(self, count):
        part = self.shown if count > 12 else self.shown[:count]
        if not part or part.endswith("\r"):
            return
        num_replaced = self.num_replaced
        if part != self.shown:
            # Those closers whose turn it is.
            num_replaced = len(matched_closer_offsets(part, self.here.line_after[:num_replaced]))
        self.shown, self.num_replaced = self.shown[len(part) :], self.num_replaced - num_replaced
        self.put(self.here.insert(part, num_replaced))

    async def accept_and_go_on(self, count):
        """What a user does who likes what he sees."""
        await self.ask(Trigger.AUTOMATIC)
        await asyncio.sleep(count / 4)
        self.accept(len(self.shown) + 12)
        if count % 3:
            # What comes next of what the model wrote, line ends above all.
            for char in self.next_chars(count % 3):
                self.type(char)
        await self.ask(Trigger.AUTOMATIC)

    async def open(self, count):
        """Type a bracket or a quote that the editor closes, and some of what is suggested in it."""
        self.type("('{"[count % 3])
        await self.ask(Trigger.AUTOMATIC)
        if self.shown and count % 2:
            self.type(plain(self.shown)[0])
            await self.ask(Trigger.AUTOMATIC)

    def next_chars(self, count):
        text, below = plain(marked(self.here)).split("▮")
        for _ in range(count):
            if (char := self.engine.after(text, below)) != "\0":
                yield char
            text += char

    def erase(self, count):
        cursor = self.here.cursor
        start = Point(cursor.line, max(0, cursor.column - count))
        change = Change("", (start.line, start.column), (cursor.line, cursor.column))
        self.put(Snapshot(self.here.document.edit([change], 1, Encoding.UTF32), start))
        self.shown = ""

    def jump(self, count):
        lines = self.here.document.lines
        # Not behind the last line: a prompt may go on without what is appended there.
        line = count % (len(lines) - 1)
        point = Point(line, min(count, len(lines[line].rstrip("\r\n"))))
        # A cursor that moves tells the server nothing.
        self.states[self.uri].append(Snapshot(self.here.document, point))
        self.shown = ""

    def edit_elsewhere(self, count):
        """In the first line or the last, as a formatter or another cursor does."""
        lines, cursor = self.here.document.lines, self.here.cursor
        line = (0, len(lines) - 1)[count % 2]
        if line != cursor.line:
            change = Change("b", (line, 0), (line, 0))
            document = self.here.document.edit([change], 1, Encoding.UTF32)
            self.put(Snapshot(document, cursor))

    def undo(self, count):
        states = self.states[self.uri]
        self.put(states[max(0, len(states) - 1 - count)])
        self.shown = ""

    def switch(self, count):
        self.uri = sorted(self.states)[count % len(self.states)]
        self.shown = ""

    def configure(self, count):
        self.completer.configure(SETTINGS[count % 2])

    async def ask(self, trigger):
        here, options = self.here, self.completer.settings
        answer = await self.completer.complete(here, trigger)
        self.shown, self.num_replaced = answer.text, answer.num_replaced
        self.num_replacing += answer.num_replaced > 0
        self.sources.append(str(answer.source))
        await self.check(answer, here, options, trigger)

    async def leave(self, count):
        """Ask, and take it back after a while."""
        task = asyncio.ensure_future(self.completer.complete(self.here, Trigger.AUTOMATIC))
        await asyncio.sleep(count * self.engine.delay_s)
        task.cancel()
        await asyncio.wait([task])

    async def hang_on(self, _):
        """Ask, and look at the answer at the end."""
        task = asyncio.ensure_future(self.completer.complete(self.here, Trigger.AUTOMATIC))
        self.pending.append((task, self.here, self.completer.settings))
        await asyncio.sleep(0)

    async def end(self):
        for task, snapshot, options in self.pending:
            await asyncio.wait([task])
            if not task.cancelled():
                self.sources.append(str(task.result().source))
                await self.check(task.result(), snapshot, options, Trigger.AUTOMATIC)

    async def check(self, answer, snapshot, options, trigger):
        fresh = await self.afresh(snapshot, options, trigger)
        if (answer.text, answer.num_replaced, answer.reason) == (fresh.text, 0, fresh.reason):
            return
        what = f"{answer.source} {answer.text!r} in the place of {answer.num_replaced}, "
        what += f"but afresh {fresh.text!r} in {marked(snapshot)!r}"
        if not answer.text:
            assert await self.is_nothing(snapshot, options, trigger), what
            return
        may_be_typed = MAX_TYPED if answer.source in {AnswerSource.TYPED_THROUGH, AnswerSource.JOINED} else 0
        assert await self.is_rest(answer, snapshot, options, may_be_typed), what

    async def is_nothing(self, snapshot, options, trigger):
        """Whether there is nothing without the closers behind the cursor, either, or nothing else."""
        before, after = marked(snapshot).split("▮")
        for closed in closers_of(after):
            fresh = await self.afresh(at(snapshot.document, before, after[len(closed) :]), options, trigger)
            if not fresh.text.strip() or closed.startswith(fresh.text.strip()):
                return True
        return False

    async def is_rest(self, answer, snapshot, options, may_be_typed):
        before, after = marked(snapshot).split("▮")
        for closed in closers_of(after):
            for size in range(min(may_be_typed, len(before)) + 1):
                typed = plain(before[len(before) - size :])
                origin = at(snapshot.document, before[: len(before) - size], after[len(closed) :])
                accepted = typed + plain(answer.text) + closed[answer.num_replaced :]
                for trigger in Trigger:
                    whole = plain((await self.afresh(origin, options, trigger)).text)
                    if any(accepted == whole + closed[index:] for index in range(len(closed) + 1)):
                        return True
        return False

    async def afresh(self, snapshot, options, trigger):
        key = marked(snapshot), options.max_new_tokens, trigger
        if key not in self.fresh:
            completer = Completer(options.model_copy(update={"prefetch": False}))
            completer.use(PureEngine(self.engine.seed, 0))
            self.fresh[key] = await completer.complete(snapshot, trigger)
        return self.fresh[key]


def closers_of(after):
    """What an editor may have put behind the cursor of what stands there."""
    closers = after[: len(after) - len(after.lstrip(ADDED))]
    return [closers[:size] for size in range(len(closers) + 1)]


def plain(text):
    return text.replace("\r\n", "\n")


def marked(snapshot):
    lines = snapshot.document.lines.copy()
    line, column = snapshot.cursor.line, snapshot.cursor.column
    lines[line] = lines[line][:column] + "▮" + lines[line][column:]
    return "".join(lines)


def at(document, before, after):
    new = Document.open(document.uri, document.language_id, 1, before + after)
    return Snapshot(new, Snapshot(Document.open("", "", 1, ""), Point(0, 0)).insert(before).cursor)


OPERATIONS = {
    "ask": lambda session, _: session.ask(Trigger.AUTOMATIC),
    "ask again": lambda session, _: session.ask(Trigger.AUTOMATIC),
    "invoke": lambda session, _: session.ask(Trigger.INVOKED),
    "ask and leave": Session.leave,
    "ask and hang on": Session.hang_on,
    "type": lambda session, count: session.type(ALPHABET[count % (len(ALPHABET) - 1)]),
    "type as suggested": lambda session, _: session.type((plain(session.shown) or "a")[0]),
    "open": Session.open,
    "accept": Session.accept,
    "accept and go on": Session.accept_and_go_on,
    "erase": Session.erase,
    "jump": Session.jump,
    "edit elsewhere": Session.edit_elsewhere,
    "undo": Session.undo,
    "switch": Session.switch,
    "configure": Session.configure,
    "close": lambda session, _: session.completer.forget(session.uri),
    "rest": lambda _, count: asyncio.sleep(count / 10),
}
STEPS = st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 16)), max_size=40)


async def play(steps, seed):
    engine = PureEngine(seed, 0.01)
    completer = Completer(SETTINGS[0])
    completer.use(engine)
    states = {
        "file:///a.py": [at(Document.open("file:///a.py", "python", 1, ""), "ab(c)\n    a", "\nb\nend")],
        "file:///b.py": [at(Document.open("file:///b.py", "python", 1, ""), "a\r\n", "\r\nend")],
    }
    session = Session(engine, completer, states, "file:///a.py")
    for name, count in steps:
        if (waiting := OPERATIONS[name](session, count)) is not None:
            await waiting
    await session.end()
    completer.drop_work()
    return session


@settings(max_examples=examples(2), suppress_health_check=[HealthCheck.too_slow])
@given(STEPS, st.integers(0, 1000))
def test_no_answer_is_stale(steps, seed):
    virtual_time.run(play(steps, seed))


def test_random_sessions_reach_every_source():
    chance = random.Random(0)
    reached, num_replacing = set(), 0
    for seed in range(60):
        steps = [(chance.choice(sorted(OPERATIONS)), chance.randint(0, 16)) for _ in range(60)]
        session = virtual_time.run(play(steps, seed))
        reached |= set(session.sources)
        num_replacing += session.num_replacing
    assert num_replacing > 20
    assert reached == {str(source) for source in AnswerSource}
