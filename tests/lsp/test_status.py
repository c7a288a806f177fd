"""`midfill/status`: what a status line shows."""

import asyncio

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")

URI = "file:///work/main.py"


async def status(client, state=None):
    """The status; if `state` is given, once it is that."""
    async with asyncio.timeout(60):
        while True:
            found = await client.request("midfill/status", None)
            if state in {None, found["state"]}:
                return found


async def test_a_model_that_is_being_loaded_is_named(client):
    it = await client(load_delay_s=600, options={"model": "qwen2.5-coder-1.5b"})
    found = await status(it)
    assert (found["state"], found["model"]) == ("loading", "qwen2.5-coder-1.5b")
    assert (found["adapter"], found["device"], found["dtype"]) == (None, None, None)
    assert (found["message"], found["tokensPerSecond"]) == (None, None)


async def test_a_loaded_model_tells_where_it_runs_and_how_fast(client):
    it = await client({"text": "a" * 20, "token_delay_s": 0.01}, options={"prefetch": False})
    found = await status(it, "ready")
    assert (found["model"], found["device"], found["dtype"]) == ("scripted", "cpu", "script")
    assert found["attention"] is None
    assert (found["message"], found["tokensPerSecond"], found["enabled"]) == (None, None, True)
    item = {"uri": URI, "languageId": "python", "version": 1, "text": "x = "}
    it.notify("textDocument/didOpen", {"textDocument": item})
    here = {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 4}}
    await it.request("textDocument/inlineCompletion", here | {"context": {"triggerKind": 1}})
    # A token takes 10 ms, or longer where the machine is busy.
    assert 0 < (await status(it))["tokensPerSecond"] <= 100


async def test_a_model_that_cannot_be_loaded_says_why(client):
    it = await client(load_error="There is no model here.")
    assert (await status(it, "failed"))["message"] == "There is no model here."


async def test_switched_off_is_told(client):
    it = await client(options={"enabled": False})
    assert (await status(it))["enabled"] is False
    it.notify("workspace/didChangeConfiguration", {"settings": {"enabled": True}})
    assert (await status(it))["enabled"] is True


async def test_a_null_takes_a_setting_back_to_the_users_own(client):
    it = await client(options={"enabled": False, "model": None})
    assert (await status(it))["enabled"] is False
    it.notify("workspace/didChangeConfiguration", {"settings": {"midfill": {"enabled": None}}})
    assert (await status(it))["enabled"] is True
    assert not any(method == "window/showMessage" for method, _ in it.heard)
