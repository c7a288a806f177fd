"""What an editor gets from the real server process, with a scripted engine in place of the model."""

import asyncio
import json

import pytest

from midfill.lsp.client import SERVE_COMMAND, Client, ServerError
from midfill.lsp.messages import REPLAYED

pytestmark = pytest.mark.asyncio(loop_scope="module")

URI = "file:///work/main.py"
PATIENT = {"popup_budget_ms": 10_000}


def open_document(client, text, uri=URI, language="python", version=1):
    item = {"uri": uri, "languageId": language, "version": version, "text": text}
    client.notify("textDocument/didOpen", {"textDocument": item})


def change(client, start, end, text, version):
    area = {
        "start": dict(zip(("line", "character"), start, strict=True)),
        "end": dict(zip(("line", "character"), end, strict=True)),
    }
    params = {
        "textDocument": {"uri": URI, "version": version},
        "contentChanges": [{"range": area, "text": text}],
    }
    client.notify("textDocument/didChange", params)


def at(line, character, uri=URI, trigger=2):
    return {
        "textDocument": {"uri": uri},
        "position": {"line": line, "character": character},
        "context": {"triggerKind": trigger},
    }


async def ghost(client, line, character, **kwargs):
    return await client.request("textDocument/inlineCompletion", at(line, character, **kwargs))


async def explain(client, uri=URI):
    return await client.request("midfill/explain", {"textDocument": {"uri": uri}})


async def ready(client):
    """The (scripted) model has been loaded."""
    async with asyncio.timeout(60):
        while not any(m == "$/progress" and p["value"]["kind"] == "end" for m, p in client.heard):
            await client.request("midfill/explain", {"textDocument": {"uri": "file:///ready"}})


@pytest.mark.parametrize(
    ("selected", "start", "insert"),
    [
        ({"text": "loads"}, (0, 9), "loads(data)"),
        # The selected item replaces more than was typed, and is of two lines.
        ({"text": "x = 1\nloads"}, (0, 0), "x = 1\nloads(data)"),
    ],
)
async def test_a_suggestion_extends_the_selected_item_of_the_popup(client, selected, start, insert):
    server = await client({"after": "loads", "text": "(data)"}, {"text": "wrong"})
    await ready(server)
    open_document(server, "x = json.lo\n")
    area = {"start": {"line": 0, "character": start[1]}, "end": {"line": 0, "character": 11}}
    params = at(0, 11)
    params["context"]["selectedCompletionInfo"] = selected | {"range": area}
    answer = await server.request("textDocument/inlineCompletion", params)
    closers = [[insert.index("("), insert.index(")")]]
    assert answer["items"] == [{"insertText": insert, "range": area, "data": {"closers": closers}}]
    # The document itself has not changed.
    text = await server.request("midfill/documentText", {"textDocument": {"uri": URI}})
    assert text["text"] == "x = json.lo\n"


async def test_a_selected_item_without_a_range_is_ignored(client):
    server = await client({"after": "json.lo", "text": "ads(data)"})
    await ready(server)
    open_document(server, "x = json.lo\n")
    params = at(0, 11)
    params["context"]["selectedCompletionInfo"] = {"text": "loads", "range": None}
    answer = await server.request("textDocument/inlineCompletion", params)
    assert [item["insertText"] for item in answer["items"]] == ["ads(data)"]


async def test_ghost_text_goes_to_the_cursor(client):
    server = await client({"text": "2))"})
    await ready(server)
    open_document(server, "print(add(1, ))\n")
    here = {"line": 0, "character": 13}
    assert await ghost(server, 0, 13) == {
        "items": [{"insertText": "2", "range": {"start": here, "end": here}, "data": {"closers": []}}]
    }


async def test_columns_are_utf_16_unless_agreed_otherwise(client):
    server = await client({"text": "1"})
    await ready(server)
    open_document(server, "s = '😀'; a = \n")
    (item,) = (await ghost(server, 0, 14))["items"]
    assert item["range"]["start"] == {"line": 0, "character": 14}


async def popup(client, line, character):
    params = {"textDocument": {"uri": URI}, "position": {"line": line, "character": character}}
    return await client.request("textDocument/completion", params)


async def test_the_popup_item_begins_at_the_word_before_the_cursor(client):
    server = await client({"after": "su", "text": "m(values)"}, {"text": "sum(values)"}, options=PATIENT)
    await ready(server)
    open_document(server, "    total = \n")
    answer = await popup(server, 0, 12)
    (item,) = answer["items"]
    assert answer["isIncomplete"] is True
    here = {"line": 0, "character": 12}
    assert item["label"] == item["filterText"] == "sum(values)"
    assert item["textEdit"] == {"range": {"start": here, "end": here}, "newText": "sum(values)"}
    assert item["documentation"] == "total = sum(values)"
    assert item["insertTextFormat"] == 1
    assert "insertText" not in item
    change(server, (0, 12), (0, 12), "su", 2)
    (item,) = (await popup(server, 0, 14))["items"]
    assert item["label"] == item["filterText"] == "sum(values)"
    there = {"line": 0, "character": 14}
    assert item["textEdit"] == {"range": {"start": here, "end": there}, "newText": "sum(values)"}


async def test_a_popup_item_of_several_lines_is_named_and_found_by_its_first(client):
    body = "n = 1\n    return n"
    server = await client({"after": "    ", "text": body}, {"text": "\n    " + body}, options=PATIENT)
    await ready(server)
    open_document(server, "def f():\n    \n")
    (item,) = (await popup(server, 1, 4))["items"]
    assert (item["label"], item["filterText"]) == ("n = 1", "n = 1")
    assert item["textEdit"]["newText"] == body
    # A first line that is empty says nothing.
    open_document(server, "def f():\n")
    (item,) = (await popup(server, 0, 8))["items"]
    assert (item["label"], item["filterText"]) == ("n = 1", "    n = 1")


async def test_no_popup_waits_for_the_model(client, tmp_path):
    log = tmp_path / "log"
    rule = {"text": "sum(values)", "prefill_delay_s": 2}
    server = await client(rule, options={"popup_budget_ms": 20}, log=str(log))
    await ready(server)
    open_document(server, "    total = \n")
    params = {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 12}}
    # Had it waited for the model, it would have the item.
    answer = await server.request("textDocument/completion", params)
    assert answer == {"isIncomplete": True, "items": []}
    # What was late is there at a later request, without the model being asked again.
    while not answer["items"]:
        answer = await server.request("textDocument/completion", params)
    assert answer["items"][0]["label"] == "sum(values)"
    finished = [run for run in map(json.loads, log.read_text().splitlines()) if not run["idle"]]
    assert len(finished) <= 2  # the one that warms up and this one


async def test_helix_waits_for_the_model_and_gets_no_empty_incomplete_answer(script):
    """Helix would open no popup for that, and would hide the items of every slower server."""
    rules = script({"after": "total = su", "text": "m(values)", "prefill_delay_s": 0.5}, {"text": ""})
    server = await Client.start([*SERVE_COMMAND, *rules])
    try:
        await server.load({"eagerness": "always"}, name=REPLAYED + "helix")
        open_document(server, "total = su\nnothing\n")
        (item,) = (answer := await popup(server, 0, 10))["items"]
        # Six times the budget of other editors, and here at once; it asks again at the next key.
        assert (item["label"], answer["isIncomplete"]) == ("sum(values)", True)
        assert await popup(server, 1, 7) == {"isIncomplete": False, "items": []}
        # The user's own budget wins, and what is late is still not sent as "empty and incomplete".
        server.notify("workspace/didChangeConfiguration", {"settings": {"popupBudgetMs": 0}})
        change(server, (1, 0), (1, 7), "x = 1; total = su", 2)
        assert await popup(server, 1, 17) == {"isIncomplete": False, "items": []}
    finally:
        await server.close()


async def test_edits_are_applied_in_order(client):
    server = await client()
    open_document(server, "ab\ncd\n")
    change(server, (0, 1), (1, 1), "X", 2)
    change(server, (0, 0), (0, 0), "Y", 7)
    answer = await server.request("midfill/documentText", {"textDocument": {"uri": URI}})
    assert answer == {"text": "YaXd\n", "version": 7}


async def test_a_request_sees_the_document_of_its_moment(client):
    server = await client({"after": "one = ", "text": "12"}, {"after": "two = ", "text": "2"})
    await ready(server)
    open_document(server, "one = \n")
    # All in one write: the change is read before the first request has run. What it types agrees with the
    # answer, else it would end the request.
    first = server.send_request("textDocument/inlineCompletion", at(0, 6))[1]
    change(server, (0, 6), (0, 6), "1", 2)
    assert (await first)["items"][0]["insertText"] == "12"
    assert (await ghost(server, 0, 7))["items"][0]["insertText"] == "2"
    change(server, (0, 0), (0, 7), "two = ", 3)
    assert (await ghost(server, 0, 6))["items"][0]["insertText"] == "2"


async def test_cancelling_answers_at_once_and_frees_the_model(client, tmp_path):
    log = tmp_path / "log"
    server = await client(
        {"after": "slow = ", "text": "x" * 30, "token_delay_s": 0.05}, {"text": "1"}, log=str(log)
    )
    await ready(server)
    open_document(server, "slow = \nfast = \n")
    id_, slow = server.send_request("textDocument/inlineCompletion", at(0, 7))
    await explain(server)
    server.cancel(id_)
    with pytest.raises(ServerError) as error:
        await slow
    assert error.value.code == -32800
    assert (await ghost(server, 1, 7))["items"][0]["insertText"] == "1"
    runs = (json.loads(line) for line in log.read_text().splitlines())
    # What is computed ahead after an answer is left out.
    cancelled, finished = (run for run in runs if run["outcome"] == "cancelled" or not run["idle"])
    assert (cancelled["outcome"], finished["outcome"]) == ("cancelled", "finished")
    assert cancelled["steps"] < 30


async def test_a_newer_request_cancels_the_older_one(client):
    server = await client({"after": "slow = ", "hang": True}, {"text": "1"})
    await ready(server)
    open_document(server, "slow = \nfast = \n")
    slow = server.send_request("textDocument/inlineCompletion", at(0, 7))[1]
    fast = await ghost(server, 1, 7)
    with pytest.raises(ServerError) as error:
        await slow
    assert error.value.code == -32800
    assert fast["items"]


async def test_requests_of_other_documents_are_left_alone(client):
    server = await client({"text": "1", "prefill_delay_s": 0.05})
    await ready(server)
    open_document(server, "a = \n")
    open_document(server, "b = \n", uri="file:///other.py")
    answers = await asyncio.gather(ghost(server, 0, 4), ghost(server, 0, 4, uri="file:///other.py"))
    assert [len(answer["items"]) for answer in answers] == [1, 1]


async def test_closing_a_document_cancels_its_requests(client):
    server = await client({"hang": True})
    await ready(server)
    open_document(server, "a = \n")
    slow = server.send_request("textDocument/inlineCompletion", at(0, 4))[1]
    server.notify("textDocument/didClose", {"textDocument": {"uri": URI}})
    with pytest.raises(ServerError) as error:
        await slow
    assert error.value.code == -32800


async def test_every_empty_answer_has_a_reason(client):
    server = await client({"after": "quiet = "}, {"text": "1"})
    await ready(server)
    open_document(server, "quiet = \nx = lazy\n")
    assert (await ghost(server, 0, 8))["items"] == []
    assert (await explain(server))["reason"] == "model-silent"
    assert (await ghost(server, 1, 6))["items"] == []
    assert (await explain(server))["reason"] == "mid-word"
    assert (await ghost(server, 0, 0, uri="file:///closed.py"))["items"] == []
    assert (await explain(server, "file:///closed.py"))["reason"] == "not-open"
    assert "not open" in (await explain(server, "file:///closed.py"))["message"]


async def test_what_the_model_is_not_sure_of_is_shown_only_when_asked_for(client):
    server = await client({"text": "compute(value)", "logprob": -2.0}, {"text": "1"})
    await ready(server)
    open_document(server, "a = \n")
    assert (await ghost(server, 0, 4))["items"] == []
    why = await explain(server)
    assert why["reason"] == "low-confidence"
    assert "eagerness" in why["message"]
    assert (await ghost(server, 0, 4, trigger=1))["items"][0]["insertText"] == "compute(value)"
    settings = {"settings": {"midfill": {"eagerness": "always"}}}
    server.notify("workspace/didChangeConfiguration", settings)
    assert (await ghost(server, 0, 4))["items"][0]["insertText"] == "compute(value)"


async def test_while_the_model_is_loaded_answers_are_empty_with_that_reason(client):
    server = await client({"text": "1"}, load_delay_s=30)
    open_document(server, "a = \n")
    assert (await ghost(server, 0, 4))["items"] == []
    assert (await explain(server))["reason"] == "loading"


async def test_a_model_that_cannot_be_loaded_is_said_once_and_the_server_stays(client):
    server = await client(load_error="The file of the model is damaged. Fetch it again.")
    await ready(server)
    open_document(server, "a = \n")
    for _ in range(3):
        assert (await ghost(server, 0, 4))["items"] == []
    assert (await explain(server))["reason"] == "model-failed"
    messages = [params["message"] for method, params in server.heard if method == "window/showMessage"]
    assert messages == ["midfill: The file of the model is damaged. Fetch it again."]


async def test_loading_is_reported_by_progress(client):
    server = await client({"text": "1"})
    await ready(server)
    kinds = [params["value"]["kind"] for method, params in server.heard if method == "$/progress"]
    assert kinds == ["begin", "report", "end"]


async def test_settings_come_from_the_editor_and_can_change(client):
    server = await client({"text": "1"}, options={"disabledLanguages": ["python"]})
    await ready(server)
    open_document(server, "a = \n")
    await ghost(server, 0, 4)
    assert (await explain(server))["reason"] == "language-off"
    server.notify("workspace/didChangeConfiguration", {"settings": {"midfill": {"disabled_languages": []}}})
    assert (await ghost(server, 0, 4))["items"]


async def test_a_bad_setting_is_named_and_the_others_count(client):
    server = await client({"text": "1"}, options={"maxNewTokens": "many", "nonsense": 1, "enabled": False})
    await ready(server)
    open_document(server, "a = \n")
    await ghost(server, 0, 4)
    assert (await explain(server))["reason"] == "disabled"
    (message,) = [params["message"] for method, params in server.heard if method == "window/showMessage"]
    assert "maxNewTokens" in message
    assert "nonsense" in message
