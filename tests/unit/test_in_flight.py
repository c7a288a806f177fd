"""What is answered without the model, and what goes on for a newer request: the pipeline with a script."""

import asyncio
import json
from dataclasses import replace

import pytest
import virtual_time

from midfill.completion.answer import Answer, AnswerSource, Trigger
from midfill.completion.autoclose import auto_closing_changes, may_auto_close
from midfill.completion.cache import Computed, Match, Suggestion
from midfill.completion.completer import Completer
from midfill.completion.context.bundle import EMPTY_BUNDLE
from midfill.completion.generation import Generation
from midfill.completion.reasons import Reason
from midfill.engine.scripted import Rule, Script, ScriptedEngine
from midfill.settings import Settings
from midfill.text.documents import Change, Document, Encoding, Point, Snapshot

SUM = "total = sum(values)"


class Editor:
    """A document, a cursor ▮ and a completer that hears of every change."""

    def __init__(self, completer, marked, uri="file:///a.py"):
        before, after = marked.split("▮")
        self.completer = completer
        self.document = Document.open(uri, "python", 1, before + after)
        self.cursor = end_of(before)

    @property
    def snapshot(self):
        return Snapshot(self.document, self.cursor)

    @property
    def marked(self):
        lines = self.document.lines.copy()
        line, column = self.cursor.line, self.cursor.column
        lines[line] = lines[line][:column] + "▮" + lines[line][column:]
        return "".join(lines)

    def type(self, text, closers=""):
        """Insert at the cursor; `closers` is what the editor puts behind it."""
        moved = self.snapshot.insert(text)
        self.document = Snapshot(moved.document, moved.cursor).insert(closers).document
        self.cursor = moved.cursor
        self.completer.edited(self.document)
        return self

    def erase(self, count):
        place = self.cursor.line, self.cursor.column
        start = place[0], place[1] - count
        self.document = self.document.edit([Change("", start, place)], 1, Encoding.UTF32)
        self.cursor = Point(*start)
        self.completer.edited(self.document)
        return self

    def go(self, line, column):
        self.cursor = Point(line, column)
        return self

    async def ask(self, trigger=Trigger.AUTOMATIC):
        return await self.completer.complete(self.snapshot, trigger)

    async def sees(self):
        answer = await self.ask()
        return answer.text, str(answer.source)

    def asks(self):
        return asyncio.ensure_future(self.ask())


def match(suggested, typed, closers):
    computed = Computed(Answer(suggested), Generation(suggested, suggested), EMPTY_BUNDLE)
    return Match(Suggestion(None, computed), typed, closers)


def end_of(text):
    return Snapshot(Document.open("", "", 1, ""), Point(0, 0)).insert(text).cursor


class World:
    """A completer over a scripted engine, and what the engine did."""

    def __init__(self, log, *rules, **settings):
        self.log = log
        self._script = Script(list(rules), log=str(log))
        self.settings = Settings(**{"max_new_tokens": 200, "prefetch": False} | settings)
        self.completer = Completer(self.settings)

    async def start(self, make=ScriptedEngine):
        engine = make(self._script)
        await engine.start(lambda _message, _share: None)
        self.completer.use(engine)
        return self

    @property
    def runs(self):
        """What became of each request to the engine; what it only read is left out."""
        if not self.log.exists():
            return []
        fates = [json.loads(line)["outcome"] for line in self.log.read_text().splitlines()]
        return [fate for fate in fates if fate != "prewarmed"]


@pytest.fixture
def world(tmp_path):
    return lambda *rules, **options: World(tmp_path / "log", *rules, **options).start()


def on_virtual_time(test):
    """Timers cost no time in this test."""

    def run(world):
        virtual_time.run(test(world))

    run.__name__ = test.__name__
    return run


async def turns(count):
    for _ in range(count):
        await asyncio.sleep(0)


# Typing through.


async def test_typing_the_suggestion_asks_the_model_nothing(world):
    it = await world(Rule(SUM))
    editor = Editor(it.completer, "values = [1]\n▮\n")
    assert await editor.sees() == (SUM, "model")
    for index, char in enumerate(SUM[:-1], start=1):
        assert await editor.type(char).sees() == (SUM[index:], "typed-through")
    assert it.runs == ["finished"]


async def test_what_was_typed_through_cost_no_tokens(world):
    it = await world(Rule(SUM))
    editor = Editor(it.completer, "x\n▮\n")
    assert (await editor.ask()).num_generated > 0
    answer = await editor.type("tot").ask()
    assert (answer.num_prompt, answer.num_reused, answer.num_generated, answer.segments) == (0, 0, 0, ())


async def test_accepting_a_word_or_a_line_is_typing_through(world):
    text = "for x in y:\n        print(x)\n        done(x)"
    it = await world(Rule(text + "\n"))
    editor = Editor(it.completer, "def f(y):\n    ▮\n")
    assert await editor.sees() == (text, "model")
    assert await editor.type("for").sees() == (text[3:], "typed-through")
    line = text.index("\n") + 1
    assert await editor.type(text[3:line]).sees() == (text[line:], "typed-through")
    assert await editor.type(text[line:-1]).sees() == (")", "typed-through")
    assert it.runs == ["finished"]


async def test_backspacing_into_a_suggestion_that_is_still_right(world):
    it = await world(Rule(SUM))
    editor = Editor(it.completer, "x\n▮\n")
    await editor.ask()
    assert await editor.type("total = sun").sees() != (SUM[11:], "typed-through")
    assert await editor.erase(1).sees() == (SUM[10:], "typed-through")
    assert await editor.erase(8).sees() == (SUM[2:], "typed-through")
    assert await editor.erase(2).sees() == (SUM, "cache")


async def test_a_key_that_the_suggestion_has_not_asks_the_model(world):
    it = await world(Rule("x", after="totem"), Rule(SUM))
    editor = Editor(it.completer, "a\n▮\n")
    await editor.ask()
    assert await editor.type("totem").sees() == ("x", "model")


@pytest.mark.parametrize("ending", ["\r\n", "\r"])
async def test_line_ends_are_the_documents_own(world, ending):
    it = await world(Rule("if x:\n    y()\n"))
    editor = Editor(it.completer, f"a = 1{ending}▮{ending}")
    assert await editor.sees() == (f"if x:{ending}    y()", "model")
    assert await editor.type(f"if x:{ending}  ").sees() == ("  y()", "typed-through")


@pytest.mark.parametrize(
    ("suggested", "typed", "closers", "rest", "num_replaced"),
    [
        ("(a, b)", "(", ")", "a, b", 0),
        ("(a, b)", "(a", ")", ", b", 0),
        ("(a, [b, c])", "(a, [", "])", "b, c", 0),
        ("('x')", "('", "')", "x", 0),
        ("{\n    b()\n}", "{\n    ", "\n}", "b()", 0),
        # What goes on behind the closers takes their place.
        ("(x) {\n    b()\n}", "(", ")", "x) {\n    b()\n}", 1),
        ('("hello");', '("', '")', 'hello");', 2),
        ("(f(x), y):", "(", ")", "f(x), y):", 1),
        ("(a, [b], c)", "(a, [", "])", "b], c", 1),
        ("Vec<String>();", "Vec<", ">", "String>();", 1),
        # What was cut before its closers is closed by those of the editor.
        ("(a, b", "(a", ")", ", b", 0),
        ("([a], b", "([", "])", "a], b", 1),
        # Once the cursor is behind them, there is the rest.
        ("(x) {\n    b()\n}", "(x)", "", " {\n    b()\n}", 0),
    ],
)
def test_closers_that_the_editor_put_behind_the_cursor(suggested, typed, closers, rest, num_replaced):
    assert match(suggested, typed, closers).remainder == (rest, num_replaced)


@pytest.mark.parametrize(
    ("suggested", "typed", "closers"),
    [
        ("(a, b)", "(", "other)"),
        ("(a, b)", "[", "]"),
        ("(a, b)", "(a, b)", ""),
        ("()", "(", ")"),
        ("{\n}", "{", "}"),
        # The user has closed it, and the editor's closer stands there still.
        ("a):\n    b", "a)", ")"),
        ("'a' + b", "'a'", "'"),
    ],
)
def test_what_does_not_fit_has_no_rest(suggested, typed, closers):
    assert match(suggested, typed, closers).remainder == ("", 0)


@pytest.mark.parametrize("text", ["()", ")", '""', "def area(self)", "f([])\n"])
def test_changes_that_may_close_what_they_open(text):
    assert may_auto_close(Change(text, (2, 4), (2, 4)))


@pytest.mark.parametrize("text", ["(", "", "\n", ") {"])
def test_changes_that_close_nothing(text):
    assert not may_auto_close(Change(text, (2, 4), (2, 4)))


def test_what_replaces_text_or_all_of_it_closes_nothing():
    assert not may_auto_close(Change("()", (2, 4), (2, 5)))
    assert not may_auto_close(Change("()", None, None))


def test_of_a_thousand_changes_a_few_are_looked_at():
    changes = [Change("()", (line, 4), (line, 4)) for line in range(1_000)]
    assert auto_closing_changes(changes) == list(range(992, 1_000))
    # What closes nothing does not count.
    typed = [Change("x", (line, 4), (line, 4)) for line in range(1_000)]
    assert auto_closing_changes([changes[0], *typed, changes[1], *typed]) == [0, 1_001]
    assert auto_closing_changes(typed) == auto_closing_changes([]) == []


METHOD = "(self, width):\n    self.width = width"


async def test_a_suggestion_goes_on_behind_a_bracket_that_the_editor_closes(world):
    it = await world(Rule(METHOD + "\n"))
    editor = Editor(it.completer, "def resize▮\nx = 1\n")
    assert await editor.sees() == (METHOD, "model")
    answer = await editor.type("(", closers=")").ask()
    assert (answer.text, answer.num_replaced, answer.source) == (METHOD[1:], 1, "typed-through")
    answer = await editor.type("self").ask()
    assert (answer.text, answer.num_replaced) == (METHOD[5:], 1)
    assert it.runs == ["finished"]


@pytest.mark.parametrize("known", ["asked before", "pair", "line"])
async def test_the_model_does_not_see_what_the_editor_closed(world, known):
    it = await world(Rule("other", after="resize"), Rule(METHOD[1:] + "\n", after="resize("))
    editor = Editor(it.completer, "def resize▮\nx = 1\n")
    if known == "line":
        # All of it comes in one edit, its line end too.
        editor = Editor(it.completer, "▮x = 1\n")
        it.completer.before_auto_close(editor.snapshot)
        editor.type("def resize", closers="\n")
    elif known == "pair":
        it.completer.before_auto_close(editor.snapshot)
    else:
        await editor.ask()
    answer = await editor.type("(", closers=")").ask()
    assert (answer.text, answer.num_replaced, answer.source) == (METHOD[1:], 1, "model")
    again = await editor.ask()
    assert (again.text, again.num_replaced, again.source) == (METHOD[1:], 1, "cache")
    # To accept it leads to the text without the editor's closer.
    editor.document = editor.snapshot.insert(answer.text, answer.num_replaced).document
    assert editor.document.text == f"def resize{METHOD}\nx = 1\n"


async def test_a_closer_that_stood_there_before_is_not_replaced(world):
    it = await world(Rule("a, b):\n    return\n"))
    answer = await Editor(it.completer, "def f(▮)\nx = 1\n").ask()
    assert (answer.text, answer.num_replaced) == ("a, b", 0)


async def test_nothing_but_the_closer_is_nothing(world):
    it = await world(Rule("other", after="f"), Rule(")\n", after="f("))
    editor = Editor(it.completer, "def f▮\nx = 1\n")
    await editor.ask()
    answer = await editor.type("(", closers=")").ask()
    assert (answer.text, answer.reason) == ("", Reason.REPEATS_TEXT)


def test_what_comes_after_a_bracket_that_the_editor_closed_is_computed_ahead(world):
    virtual_time.run(_ahead_of_a_closer(world))


async def _ahead_of_a_closer(world):
    it = await world(
        Rule("x", after="resize"),
        Rule(METHOD[1:] + "\n", after="resize("),
        Rule("\n    self.area()", after="= width"),
        prefetch=True,
    )
    editor = Editor(it.completer, "class Box:\n    pass\ndef resize▮\nx = 1\n")
    it.completer.before_auto_close(editor.snapshot)
    answer = await editor.type("(", closers=")").ask()
    await asyncio.sleep(0.5)
    accepted = editor.snapshot.insert(answer.text, answer.num_replaced)
    editor.document, editor.cursor = accepted.document, accepted.cursor
    it.completer.edited(editor.document)
    assert await editor.sees() == ("\n    self.area()", "prefetch")
    assert it.runs == ["finished", "finished"]


async def test_a_bracket_that_the_editor_closes_goes_on(world):
    it = await world(Rule("(values)\n"))
    editor = Editor(it.completer, "total = sum▮\n")
    assert await editor.sees() == ("(values)", "model")
    assert await editor.type("(", closers=")").sees() == ("values", "typed-through")
    assert await editor.type("val").sees() == ("ues", "typed-through")
    assert it.runs == ["finished"]


async def test_a_change_elsewhere_makes_a_suggestion_old(world):
    it = await world(Rule("2", contains="b = 1"), Rule("1"))
    editor = Editor(it.completer, "a = 1\nx = ▮\nc = 1\n")
    await editor.ask()
    above = Editor(it.completer, "b = 1\nx = ▮\nc = 1\n")
    assert await above.sees() == ("2", "model")
    below = Editor(it.completer, "a = 1\nx = ▮\nc = 2\n")
    assert await below.sees() == ("1", "model")


async def test_documents_do_not_share_suggestions(world):
    it = await world(Rule(SUM))
    await Editor(it.completer, "a\n▮\n").ask()
    assert await Editor(it.completer, "a\n▮\n", uri="file:///b.py").sees() == (SUM, "model")


# Answers for exactly this text.


async def test_the_same_text_gets_the_same_answer_without_the_model(world):
    it = await world(Rule(SUM))
    editor = Editor(it.completer, "x\n▮\n")
    await editor.ask()
    await editor.go(0, 1).ask()
    assert await editor.go(1, 0).sees() == (SUM, "cache")


async def test_that_there_is_nothing_is_remembered_too(world):
    it = await world(Rule(""))
    editor = Editor(it.completer, "x = ▮\n")
    for _ in range(3):
        answer = await editor.ask()
        assert (answer.source, answer.reason) == (AnswerSource.NONE, Reason.MODEL_SILENT)
    assert it.runs == ["finished"]


async def test_a_failure_is_not_remembered(world):
    it = await world(Rule(error="out of memory"))
    editor = Editor(it.completer, "x = ▮\n")
    for _ in range(2):
        assert (await editor.ask()).reason == Reason.ENGINE_ERROR
    assert it.runs == ["failed", "failed"]


async def test_new_settings_forget_what_was_suggested(world):
    it = await world(Rule(SUM))
    editor = Editor(it.completer, "x\n▮\n")
    await editor.ask()
    it.completer.configure(it.settings)
    assert (await editor.ask()).source is AnswerSource.CACHE
    it.completer.configure(it.settings.model_copy(update={"max_new_tokens": 5}))
    answer = await editor.ask()
    assert answer.source is AnswerSource.MODEL
    assert len(answer.text) <= 5


async def test_an_explicit_request_is_not_answered_by_an_automatic_one(world):
    it = await world(Rule(SUM))
    editor = Editor(it.completer, "x\n▮\n")
    await editor.ask()
    assert (await editor.ask(Trigger.INVOKED)).source is AnswerSource.MODEL
    # What was asked for explicitly is what is on the screen now.
    assert await editor.type("to").sees() == (SUM[2:], "typed-through")


async def test_a_closed_document_is_forgotten(world):
    it = await world(Rule(SUM))
    editor = Editor(it.completer, "x\n▮\n")
    await editor.ask()
    it.completer.forget("file:///a.py")
    assert await editor.sees() == (SUM, "model")


async def test_memory_is_bounded(world):
    it = await world(Rule("1"))
    editor = Editor(it.completer, "x = ▮\n")
    await editor.ask()
    for number in range(100):
        await Editor(it.completer, f"x{number} = ▮\n").ask()
        await Editor(it.completer, "y = ▮\n", uri=f"file:///{number}.py").ask()
    kept = it.completer._cache._kept
    assert len(kept) == 64
    assert max(map(len, kept.values())) <= 32
    assert (await editor.ask()).source is AnswerSource.MODEL


# Joining.


async def test_a_newer_request_joins_the_flight_that_agrees(world):
    it = await world(Rule(SUM, token_delay_s=0.001))
    editor = Editor(it.completer, "x\n▮\n")
    older = editor.asks()
    await turns(5)
    older.cancel()
    assert await editor.type("tot").sees() == (SUM[3:], "joined")
    assert older.cancelled()
    assert it.runs == ["finished"]


async def test_two_requests_for_the_same_text_run_the_model_once(world):
    it = await world(Rule(SUM, token_delay_s=0.001))
    editor = Editor(it.completer, "x\n▮\n")
    answers = await asyncio.gather(editor.asks(), editor.asks())
    assert [answer.text for answer in answers] == [SUM, SUM]
    assert [answer.source for answer in answers] == [AnswerSource.MODEL, AnswerSource.JOINED]
    assert it.runs == ["finished"]


@on_virtual_time
async def test_an_edit_that_contradicts_the_flight_frees_the_model_at_once(world):
    it = await world(Rule(SUM, token_delay_s=0.1))
    editor = Editor(it.completer, "x\n▮\n")
    older = editor.asks()
    await asyncio.sleep(0.35)
    editor.type("to")
    await turns(5)
    assert it.runs == []
    editor.type("z")
    await turns(5)
    assert it.runs == ["cancelled"]
    assert older.cancelled()


@on_virtual_time
async def test_tokens_that_contradict_what_was_typed_begin_anew(world):
    it = await world(
        Rule("ebra", after="z", token_delay_s=0.1), Rule(SUM, token_delay_s=0.1, prefill_delay_s=0.5)
    )
    editor = Editor(it.completer, "x\n▮\n")
    older = editor.asks()
    await asyncio.sleep(0.1)
    assert await editor.type("z").sees() == ("ebra", "model")
    assert older.cancelled()
    assert it.runs == ["cancelled", "finished"]


async def test_the_user_may_be_ahead_of_the_model(world):
    it = await world(Rule(SUM, prefill_delay_s=0.01))
    editor = Editor(it.completer, "x\n▮\n")
    older = editor.asks()
    await turns(5)
    assert await editor.type("total = s").sees() == (SUM[9:], "joined")
    assert (await older).text == SUM
    assert it.runs == ["finished"]


@on_virtual_time
async def test_a_flight_that_nobody_joins_ends(world):
    it = await world(Rule(SUM * 100, token_delay_s=0.1))
    editor = Editor(it.completer, "x\n▮\n")
    older = editor.asks()
    await asyncio.sleep(1)
    older.cancel()
    await turns(3)
    assert it.runs == []
    await asyncio.sleep(0.3)
    assert it.runs == ["cancelled"]


@on_virtual_time
async def test_an_edit_that_agrees_keeps_a_flight_for_the_next_request(world):
    it = await world(Rule(SUM, token_delay_s=0.1))
    editor = Editor(it.completer, "x\n▮\n")
    older = editor.asks()
    await asyncio.sleep(0.05)
    older.cancel()
    for char in "tota":
        await asyncio.sleep(0.2)
        editor.type(char)
    assert await editor.sees() == (SUM[4:], "joined")
    assert it.runs == ["finished"]


@on_virtual_time
async def test_who_moves_away_frees_the_model(world):
    it = await world(Rule("slow", after="s = ", token_delay_s=1), Rule("1"))
    editor = Editor(it.completer, "s = ▮\nf = \n")
    older = editor.asks()
    await asyncio.sleep(0.5)
    older.cancel()
    assert await editor.go(1, 4).sees() == ("1", "model")
    assert it.runs == ["cancelled", "finished"]


async def test_closing_a_document_ends_its_flights(world):
    it = await world(Rule(hang=True))
    editor = Editor(it.completer, "x\n▮\n")
    request = editor.asks()
    await turns(5)
    it.completer.forget("file:///a.py")
    with pytest.raises(asyncio.CancelledError):
        await request
    assert it.runs == ["cancelled"]


async def test_a_failure_is_told_to_all_who_wait(world):
    it = await world(Rule(error="out of memory", error_after=0, prefill_delay_s=0.01))
    editor = Editor(it.completer, "x\n▮\n")
    older = editor.asks()
    await turns(5)
    newer = editor.type("t").asks()
    assert [(await it).reason for it in (older, newer)] == [Reason.ENGINE_ERROR] * 2
    assert it.runs == ["failed"]


# What was computed beyond the end, and ahead.


class LongTokens(ScriptedEngine):
    """A token of this engine is forty characters, and so may go far beyond the end of a suggestion."""

    async def generate(self, request):
        tokens = [token async for token in super().generate(request)]
        for at in range(0, len(tokens), 40):
            text = "".join(token.text for token in tokens[at : at + 40])
            yield replace(tokens[at], text=text)


async def test_what_the_model_wrote_beyond_the_end_is_there_once_the_user_is(tmp_path):
    it = World(tmp_path / "log", Rule("return 1\n\ndef g():\n    return 2\nx\n" + "y" * 50))
    await it.start(LongTokens)
    editor = Editor(it.completer, "x = 0\ndef f():\n    ▮\n")
    assert await editor.sees() == ("return 1", "model")
    typed = editor.type("return 1\n\n").type("def g():")
    assert await typed.sees() == ("\n    return 2", "continuation")
    assert it.runs == ["finished"]


@on_virtual_time
async def test_while_the_user_rests_the_next_suggestion_is_computed(world):
    it = await world(Rule("\nb()\n", after="a()"), Rule("a()\n"), prefetch=True)
    editor = Editor(it.completer, "x = 1\n▮\nrest()\n")
    assert await editor.sees() == ("a()", "model")
    await asyncio.sleep(1)
    assert it.runs == ["finished", "finished"]
    assert await editor.type("a()").sees() == ("\nb()", "prefetch")
    assert await editor.type("\nb").sees() == ("()", "typed-through")
    assert it.runs == ["finished", "finished"]


@on_virtual_time
async def test_who_accepts_at_once_joins_what_is_computed_ahead(world):
    it = await world(Rule("\nb()\n", after="a()", token_delay_s=0.1), Rule("a()\n"), prefetch=True)
    editor = Editor(it.completer, "x = 1\n▮\nrest()\n")
    await editor.ask()
    await asyncio.sleep(0.2)
    assert await editor.type("a()").sees() == ("\nb()", "joined")
    assert it.runs == ["finished", "finished"]


@on_virtual_time
async def test_looking_ahead_stands_aside_for_a_request(world):
    it = await world(
        Rule("y" * 50, after="a()", token_delay_s=0.1),
        Rule("a()\n", contains="x = 1"),
        Rule("1"),
        prefetch=True,
    )
    await Editor(it.completer, "x = 1\n▮\nrest()\n").ask()
    await asyncio.sleep(1)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    assert await Editor(it.completer, "z = ▮\n", uri="file:///b.py").sees() == ("1", "model")
    assert loop.time() - begun < 0.1
    await asyncio.sleep(15)
    # What comes after the second answer is computed too.
    assert it.runs == ["finished"] * 4


@on_virtual_time
async def test_another_key_ends_what_is_computed_ahead(world):
    it = await world(Rule("y" * 100, after="a()", token_delay_s=0.1), Rule("a()\n"), prefetch=True)
    editor = Editor(it.completer, "x = 1\n▮\nrest()\n")
    await editor.ask()
    await asyncio.sleep(1)
    editor.type("a")
    await turns(5)
    assert it.runs == ["finished"]
    editor.type("b")
    await turns(5)
    assert it.runs == ["finished", "cancelled"]


@on_virtual_time
async def test_nothing_is_computed_ahead_unless_it_is_wanted(world):
    it = await world(Rule("a()\n"), prefetch=False)
    await Editor(it.completer, "x = 1\n▮\nrest()\n").ask()
    await asyncio.sleep(10)
    assert it.runs == ["finished"]
