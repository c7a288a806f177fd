"""A model that fails, hangs or cannot be loaded costs its own request, never the next one."""

import asyncio
import time

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")

URI = "file:///work/main.py"
TEXT = "good = \nbad = \n"


def open_document(server, text=TEXT, uri=URI):
    item = {"uri": uri, "languageId": "python", "version": 1, "text": text}
    server.notify("textDocument/didOpen", {"textDocument": item})


async def ask(server, line, method="textDocument/inlineCompletion"):
    character = len(TEXT.splitlines()[line])
    params = {
        "textDocument": {"uri": URI},
        "position": {"line": line, "character": character},
        "context": {"triggerKind": 2},
    }
    server.request("ask", method, params)
    answer = await server.answer("ask")
    server.request("why", "midfill/explain", {"textDocument": {"uri": URI}})
    return answer["result"]["items"], (await server.answer("why"))["result"]["reason"]


@pytest.mark.parametrize("method", ["textDocument/inlineCompletion", "textDocument/completion"])
@pytest.mark.parametrize(
    "bad", [{"error": "out of memory"}, {"crash": True}], ids=["says so", "any exception"]
)
async def test_a_step_that_raises_fails_its_request_only(scripted, method, bad):
    server = await scripted({"after": "bad = "} | bad, {"text": "1"})
    await server.loaded()
    open_document(server)
    for _ in range(3):
        assert await ask(server, 1, method) == ([], "engine-error")
        assert len((await ask(server, 0, method))[0]) == 1


async def test_an_engine_that_is_lost_is_said_once(scripted):
    sentence = "The model was restarted 3 times; restart the server."
    server = await scripted({"after": "bad = ", "error": sentence, "lost": True}, {"text": "1"})
    await server.loaded()
    open_document(server)
    for _ in range(3):
        assert await ask(server, 1) == ([], "engine-unavailable")
    assert len((await ask(server, 0))[0]) == 1
    said = [message["params"] for message in server.seen if message.get("method") == "window/showMessage"]
    assert said == [{"type": 2, "message": f"midfill: {sentence}"}]


async def test_a_step_that_raises_in_the_middle_of_an_answer(scripted):
    server = await scripted(
        {"after": "bad = ", "text": "12345", "error": "gone", "error_after": 3}, {"text": "1"}
    )
    await server.loaded()
    open_document(server)
    assert await ask(server, 1) == ([], "engine-error")
    assert len((await ask(server, 0))[0]) == 1


async def test_a_hang_ends_at_the_deadline_and_the_next_request_is_served(scripted):
    server = await scripted({"after": "bad = ", "hang": True}, {"text": "1"}, initialize=False)
    await server.initialize(initializationOptions={"deadlineS": 2})
    await server.loaded()
    open_document(server)
    begun = time.monotonic()
    assert await ask(server, 1) == ([], "deadline")
    assert time.monotonic() - begun >= 2
    assert len((await ask(server, 0))[0]) == 1


async def test_many_hangs_do_not_pile_up(scripted):
    server = await scripted({"after": "bad = ", "hang": True}, {"text": "1"}, initialize=False)
    await server.initialize(initializationOptions={"deadlineS": 3})
    await server.loaded()
    begun = time.monotonic()
    for number in range(50):
        uri = f"file:///{number}.py"
        open_document(server, "bad = ", uri)
        params = {
            "textDocument": {"uri": uri},
            "position": {"line": 0, "character": 6},
            "context": {"triggerKind": 2},
        }
        server.request(number, "textDocument/inlineCompletion", params)
    for _ in range(50):
        assert (await server.receive())["result"]["items"] == []
    # The deadline counts from the request, so that all end together. One after the other they take 150 s.
    assert time.monotonic() - begun < 50 * 3 / 2
    open_document(server)
    assert len((await ask(server, 0))[0]) == 1


@pytest.mark.parametrize(
    "how",
    [{"load_error": "The file is damaged. Fetch it again."}, {"load_crash": True}, {"unknown": 1}],
    ids=str,
)
async def test_a_model_that_cannot_be_loaded_is_said_in_one_sentence(scripted, how):
    server = await scripted({"text": "1"}, **how)
    message = await server.receive()
    assert message["method"] == "window/showMessage"
    assert message["params"]["type"] == 1
    assert message["params"]["message"].startswith("midfill: ")
    assert "Traceback" not in message["params"]["message"]
    open_document(server)
    for _ in range(3):
        assert await ask(server, 0) == ([], "model-failed")
    assert [m for m in server.seen if m.get("method") == "window/showMessage"] == [message]


async def test_shutting_down_while_the_model_is_loaded(scripted):
    server = await scripted({"text": "1"}, load_delay_s=60)
    await server.serves()
    server.request(1, "shutdown")
    await server.answer(1)
    server.notify("exit")
    assert await server.status() == 0


async def test_an_engine_that_blocks_the_process_does_not_outlive_its_editor(scripted):
    """A forward pass in native code cannot be interrupted; the process ends all the same."""
    server = await scripted({"text": "1"}, load_block_s=60)
    server.request(1, "shutdown")
    await server.answer(1)
    server.notify("exit")
    assert await server.status() == 0


async def test_cancelling_during_a_fault_answers_once(scripted):
    server = await scripted({"after": "bad = ", "error": "gone", "prefill_delay_s": 0.01}, {"text": "1"})
    await server.loaded()
    open_document(server)
    for id_ in range(50):
        params = {
            "textDocument": {"uri": URI},
            "position": {"line": 1, "character": 6},
            "context": {"triggerKind": 2},
        }
        server.request(id_, "textDocument/inlineCompletion", params)
        # Now and then just before, at and after the fault.
        await asyncio.sleep(0.0005 * (id_ % 40))
        server.notify("$/cancelRequest", {"id": id_})
        answer = await server.answer(id_)
        assert "result" in answer or answer["error"]["code"] == -32800
    assert len((await ask(server, 0))[0]) == 1
