import asyncio
import json

import pytest
import virtual_time
from clock import in_its_own_time
from planted import certain

from midfill.completion.answer import Trigger
from midfill.completion.completer import Completer
from midfill.completion.explanation import explain
from midfill.completion.reasons import REASONS, Reason
from midfill.engine.scripted import Rule, Script, ScriptedEngine
from midfill.errors import EngineUnavailableError, ModelError
from midfill.settings import Settings
from midfill.text.documents import Document, Point, Snapshot


def snapshot(marked, uri="file:///a.py"):
    before, after = marked.split("▮")
    document = Document.open(uri, "python", 1, before + after)
    return Snapshot(document, Point(before.count("\n"), len(before) - before.rfind("\n") - 1))


async def completer(*rules, log="", **settings):
    engine = ScriptedEngine(Script(list(rules), log=str(log)))
    await engine.start(lambda _message, _share: None)
    result = Completer(Settings(**{"prefetch": False} | settings))
    result.use(engine)
    return result


async def ask(it, marked="a = ▮", trigger=Trigger.AUTOMATIC):
    return await it.complete(snapshot(marked), trigger)


async def test_an_answer_says_where_it_comes_from_and_what_it_cost():
    answer = await ask(await completer(Rule("1")))
    assert (answer.text, answer.source, answer.reason) == ("1", "model", None)
    # The blank before the cursor was held back, and is generated again.
    assert answer.num_generated == 2
    assert answer.num_prompt == sum(size for _, size in answer.segments)


async def test_an_answer_knows_the_log_probabilities_of_its_own_tokens_only():
    # One token for each character; the blank is healed, and what follows the line is trimmed.
    answer = await ask(await completer(Rule("12)\nmore", logprob=-0.1)), "f(a, ▮)")
    assert answer.text == "12"
    assert answer.finished
    assert [end for end, _ in answer.tokens] == [1, 2]
    assert not (await ask(await completer(Rule("12345"), max_new_tokens=3), "a = ▮")).finished


UNSURE = Rule("compute(value)\nmore\n", logprob=-1.5)


async def test_what_the_model_is_not_sure_of_is_shown_only_to_who_asks():
    answer = await ask(await completer(UNSURE))
    assert (answer.text, answer.reason) == ("", Reason.LOW_CONFIDENCE)
    assert "`eagerness` = normal" in answer.detail
    assert (await ask(await completer(UNSURE), trigger=Trigger.INVOKED)).text
    assert (await ask(await completer(UNSURE, eagerness="always"))).text


async def test_what_was_silenced_is_still_shown_to_who_asks_afterwards():
    it = await completer(UNSURE)
    assert (await ask(it)).reason == Reason.LOW_CONFIDENCE
    assert (await ask(it)).reason == Reason.LOW_CONFIDENCE
    assert (await ask(it, trigger=Trigger.INVOKED)).text
    it.configure(Settings(eagerness="always"))
    assert (await ask(it)).text


async def test_of_several_lines_those_are_shown_that_the_model_is_sure_of():
    sure = Rule("compute(value)\nguess_what_comes_then(value)\n", logprob=-0.05)
    assert (await ask(await completer(sure, max_new_tokens=64), "a = ▮\r\n")).text == "compute(value)"


async def test_an_engine_that_tells_no_log_probabilities_is_not_silenced():
    assert (await ask(await completer(Rule("compute(value)")))).text == "compute(value)"


async def test_before_the_model_is_loaded_the_reason_is_loading():
    assert (await ask(Completer(Settings()))).reason == Reason.LOADING


async def test_after_loading_failed_the_reason_is_that():
    it = Completer(Settings())
    it.fail("no such file")
    assert (await ask(it)).reason == Reason.MODEL_FAILED


async def test_a_failing_engine_is_a_reason_and_the_next_request_works():
    it = await completer(Rule(after="bad = ", error="out of memory"), Rule("1"))
    assert (await ask(it, "bad = ▮")).reason == Reason.ENGINE_ERROR
    assert (await ask(it)).text == "1"


@in_its_own_time
async def test_a_hanging_engine_ends_at_the_deadline_and_the_next_request_works():
    it = await completer(Rule(after="slow = ", hang=True), Rule("1"), deadline_s=0.1)
    assert (await ask(it, "slow = ▮")).reason == Reason.DEADLINE
    assert (await ask(it)).text == "1"


@pytest.mark.parametrize(
    ("written", "shown", "late"),
    [
        (
            "first = call(one)\nsecond = call(two)\nthird = ca",
            "first = call(one)\nsecond = call(two)",
            "third = ca",
        ),
        ("first = call(one)\nsecond = call(two)\n", "first = call(one)\nsecond = call(two)", ""),
        ("first = call(one)\n", "first = call(one)", ""),
        # Half a line is none, nor is one that is empty.
        ("first = ca", "", "first = ca"),
        ("\n\nfirst = ca", "", "first = ca"),
    ],
)
@in_its_own_time
async def test_whole_lines_that_were_written_by_the_deadline_are_shown(written, shown, late):
    it = await completer(Rule(written, hang=True), deadline_s=0.3, max_new_tokens=400)
    answer = await ask(it, "a = 1\n▮\n", trigger=Trigger.INVOKED)
    assert answer.text == shown
    assert answer.reason == (None if shown else Reason.DEADLINE)
    assert ("within `deadline_s` (0.3 s)" in answer.detail) == bool(shown)
    # What it says of the filters is true: half a line was dropped, nothing else.
    assert dict(answer.texts)["model"] == written
    if late:
        assert explain(answer)["filters"][0] == {"filter": "deadline", "characters": -len(late)}
    if shown:
        typed = await ask(it, f"a = 1\n{shown[:5]}▮\n", trigger=Trigger.INVOKED)
        assert (typed.text, typed.source) == (shown[5:], "typed-through")


async def test_a_closed_engine_is_a_reason():
    engine = ScriptedEngine(Script([Rule("1")]))
    await engine.start(lambda _message, _share: None)
    it = Completer(Settings())
    it.use(engine)
    await engine.close()
    answer = await ask(it)
    assert answer.reason == Reason.ENGINE_UNAVAILABLE
    assert answer.detail
    with pytest.raises(EngineUnavailableError):
        _ = engine.model


async def test_cancelling_frees_the_engine_at_once(tmp_path):
    log = tmp_path / "log"
    it = await completer(Rule(after="slow = ", hang=True), Rule("1"), log=log)
    task = asyncio.ensure_future(ask(it, "slow = ▮"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await ask(it)).text == "1"
    fates = [json.loads(line)["outcome"] for line in log.read_text().splitlines()]
    assert fates == ["cancelled", "finished"]


async def test_the_engine_is_stopped_where_the_suggestion_ends(tmp_path):
    log = tmp_path / "log"
    it = await completer(Rule("1)\nmore = 2\nand = more\n"), log=log)
    assert (await ask(it, "a = (▮)")).text == "1"
    (line,) = log.read_text().splitlines()
    assert json.loads(line)["steps"] <= 4


async def test_while_a_file_is_searched_for_secrets_it_gets_nothing_and_others_do():
    it = await completer(Rule("1"), prefetch=False)
    it.search_s = 0
    large = "a = ▮\n" + "# password = 1\n" * 2_000
    assert (await ask(it, large)).reason == Reason.SECRET_SEARCH
    other = snapshot("b = ▮", uri="file:///b.py")
    assert (await it.complete(other, Trigger.AUTOMATIC)).text
    # It goes on by itself, and a request that waits for it is answered.
    it.search_s = 60
    assert (await ask(it, large)).text
    it.search_s = 0
    assert (await ask(it, large.replace("a =", "b ="))).text


async def test_a_secret_anywhere_in_a_large_file_is_found():
    it = await completer(Rule("1"), prefetch=False)
    it.search_s = 60
    line, _ = certain()["AWS key"]
    assert (await ask(it, f"{line}\n" + "x = 1\n" * 60_000 + "a = ▮")).reason == Reason.SECRET_IN_FILE


@pytest.mark.parametrize("where", ["above ▮\n{}\n", "{}\nbelow ▮\n"])
async def test_a_file_with_a_secret_gets_nothing_until_the_secret_is_gone(where, tmp_path):
    log = tmp_path / "log"
    it = await completer(Rule("1"), log=log)
    line, _ = certain()["GitHub token"]
    assert (await ask(it, where.format("a = 1"))).text
    answer = await ask(it, where.format(line))
    assert (answer.reason, answer.text) == (Reason.SECRET_IN_FILE, "")
    assert (await ask(it, where.format("b = 1"))).text
    assert len(log.read_text().splitlines()) == 2
    it.configure(Settings(detect_secrets=False))
    assert (await ask(it, where.format(line))).text


def test_every_reason_has_a_sentence():
    assert set(REASONS) == set(Reason)


async def test_new_settings_count_for_the_next_request():
    it = await completer(Rule("1"))
    before = await ask(it, "x = 1\n" * 40 + "a = ▮")
    it.configure(Settings(prefix_tokens=32))
    after = await ask(it, "x = 1\n" * 40 + "a = ▮")
    assert after.num_prompt < before.num_prompt


async def test_settings_that_leave_no_room_keep_the_old_ones():
    it = await completer(Rule("1"))
    old = it.settings
    with pytest.raises(ModelError, match="max_new_tokens"):
        it.configure(Settings.model_construct(**old.model_dump() | {"max_new_tokens": 100_000}))
    assert it.settings is old
    assert (await ask(it)).text == "1"


def test_where_the_user_rests_the_model_reads_what_it_would_be_asked(tmp_path):
    async def rest(name, *keys):
        log = tmp_path / name
        it = await completer(Rule("1"), log=log, prefetch=True)
        it.on_idle(snapshot("a = ▮"))
        for moment in keys:
            await asyncio.sleep(moment)
            it.edited(snapshot("ab = ▮").document)
        await asyncio.sleep(5)
        return [json.loads(line)["outcome"] for line in log.read_text().splitlines()] if log.exists() else []

    assert virtual_time.run(rest("rests")) == ["prewarmed"]
    assert virtual_time.run(rest("types on", 0.3)) == []


def test_secrets_are_not_read_ahead(tmp_path):
    async def rest():
        it = await completer(Rule("1"), log=tmp_path / "log", prefetch=True)
        it.on_idle(snapshot("a = ▮", uri="file:///.env"))
        await asyncio.sleep(5)

    virtual_time.run(rest())
    assert not (tmp_path / "log").exists()
