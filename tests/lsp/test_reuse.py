"""What an editor notices of reuse: answers without the model, work that goes on, work that ends at once."""

import asyncio
import json

import pytest

from midfill.client import ServerError

pytestmark = pytest.mark.asyncio(loop_scope="module")

URI = "file:///work/main.py"
DOCUMENT = {"textDocument": {"uri": URI}}
SUM = "total = sum(values)"


class Typist:
    """One line that is being typed into a document, with a request whenever it is wanted."""

    def __init__(self, client, log):
        self.client = client
        self.log = log
        self.line, self.column, self.version = 1, 0, 1
        item = {"uri": URI, "languageId": "python", "version": 1, "text": "values = [1]\n\n"}
        client.notify("textDocument/didOpen", {"textDocument": item})

    def type(self, text):
        here = {"line": self.line, "character": self.column}
        self.version += 1
        params = {
            "textDocument": {"uri": URI, "version": self.version},
            "contentChanges": [{"range": {"start": here, "end": here}, "text": text}],
        }
        self.client.notify("textDocument/didChange", params)
        *above, last = text.split("\n")
        self.line += len(above)
        self.column = len(last) + (0 if above else self.column)

    def pair(self, text, num_changes=1):
        """Type an opener, which the editor closes; in one change, or one for each."""
        self.version += 1
        parts = [text] if num_changes == 1 else list(text)
        starts = [{"line": self.line, "character": self.column + index} for index in range(len(parts))]
        changes = [
            {"range": {"start": start, "end": start}, "text": part}
            for start, part in zip(starts, parts, strict=True)
        ]
        params = {"textDocument": {"uri": URI, "version": self.version}, "contentChanges": changes}
        self.client.notify("textDocument/didChange", params)
        self.column += 1

    async def popup(self):
        params = DOCUMENT | {"position": {"line": self.line, "character": self.column}}
        return (await self.client.request("textDocument/completion", params))["items"]

    def ask(self):
        here = {"line": self.line, "character": self.column}
        params = DOCUMENT | {"position": here, "context": {"triggerKind": 2}}
        return self.client.send_request("textDocument/inlineCompletion", params)

    async def sees(self):
        """The suggestion and its source."""
        items = (await self.ask()[1])["items"]
        explained = await self.client.request("midfill/explain", DOCUMENT)
        return "".join(item["insertText"] for item in items), explained["source"]

    @property
    def runs(self):
        rows = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(row) for row in rows]

    async def ran(self, count):
        """The model has ended this many requests: what became of them."""
        async with asyncio.timeout(60):
            while len(self.runs) < count:
                await self.client.request("midfill/explain", DOCUMENT)
        return [run["fate"] for run in self.runs]


@pytest.fixture
def typist(client, tmp_path):
    async def start(*rules, **options):
        log = tmp_path / "log"
        server = await client(*rules, log=str(log), **options)
        async with asyncio.timeout(60):
            while not any(m == "$/progress" and p["value"]["kind"] == "end" for m, p in server.heard):
                await server.request("midfill/explain", DOCUMENT)
        return Typist(server, log)

    return start


async def cancelled(request):
    with pytest.raises(ServerError) as error:
        await request
    assert error.value.code == -32800


async def test_typing_a_suggestion_asks_the_model_nothing(typist):
    it = await typist({"text": SUM})
    assert await it.sees() == (SUM, "model")
    for index, char in enumerate(SUM[:-1], start=1):
        it.type(char)
        assert await it.sees() == (SUM[index:], "typed-through")
    assert await it.ran(1) == ["finished"]


async def test_a_newer_request_joins_and_the_older_one_is_cancelled_at_once(typist):
    it = await typist({"text": SUM, "token_delay_s": 0.05}, options={"prefetch": False})
    older = it.ask()[1]
    await it.client.request("midfill/explain", DOCUMENT)
    it.type("tot")
    newer = it.ask()[1]
    await cancelled(older)
    assert not newer.done()
    assert (await newer)["items"][0]["insertText"] == SUM[3:]
    assert (await it.client.request("midfill/explain", DOCUMENT))["source"] == "joined"
    assert await it.ran(1) == ["finished"]


async def test_a_request_that_the_editor_took_back_at_a_key_is_joined_by_the_next(typist):
    it = await typist({"text": SUM, "token_delay_s": 0.05}, options={"prefetch": False})
    id_, older = it.ask()
    await it.client.request("midfill/explain", DOCUMENT)
    it.client.cancel(id_)
    await cancelled(older)
    it.type("tot")
    assert await it.sees() == (SUM[3:], "joined")
    assert await it.ran(1) == ["finished"]


async def test_an_edit_that_contradicts_the_work_frees_the_model_at_once(typist):
    it = await typist({"text": "x" * 200, "token_delay_s": 0.05})
    request = it.ask()[1]
    await it.client.request("midfill/explain", DOCUMENT)
    it.type("y")
    await cancelled(request)
    assert await it.ran(1) == ["cancelled"]
    # It is freed long before the 200 steps that the whole answer takes.
    assert it.runs[0]["steps"] < 100


async def test_work_that_nobody_asks_for_again_ends_soon(typist):
    it = await typist({"text": "x" * 200, "token_delay_s": 0.05})
    id_, request = it.ask()
    await it.client.request("midfill/explain", DOCUMENT)
    it.client.cancel(id_)
    await cancelled(request)
    assert await it.ran(1) == ["cancelled"]
    assert it.runs[0]["steps"] < 20
    assert it.runs[0]["idle"]


async def test_while_the_user_reads_the_next_suggestion_is_computed(typist):
    it = await typist({"after": "sum(values)", "text": "\nprint(total)\n"}, {"text": SUM})
    assert await it.sees() == (SUM, "model")
    assert await it.ran(2) == ["finished", "finished"]
    assert [run["idle"] for run in it.runs] == [False, True]
    it.type(SUM)
    assert await it.sees() == ("\nprint(total)", "prefetch")
    it.type("\npr")
    assert await it.sees() == ("int(total)", "typed-through")


async def test_it_can_be_switched_off(typist):
    it = await typist({"text": SUM}, options={"prefetch": False})
    await it.sees()
    it.type(SUM)
    assert (await it.sees())[1] == "model"
    assert [run["idle"] for run in it.runs] == [False, False]


METHOD = "self):\n    return self.w"


def columns(item):
    area = item["range"] if "range" in item else item["textEdit"]["range"]
    assert area["start"]["line"] == area["end"]["line"]
    return area["start"]["character"], area["end"]["character"]


@pytest.mark.parametrize("num_changes", [1, 2])
async def test_a_bracket_that_the_editor_closed_is_replaced_by_what_goes_on_behind_it(typist, num_changes):
    rule = {"after": "area(", "text": METHOD + "\n"}
    it = await typist(rule, {"text": "x"}, options={"popup_budget_ms": 10_000})
    it.type("def area")
    it.pair("()", num_changes)
    (item,) = (await it.ask()[1])["items"]
    assert item["insertText"] == METHOD
    assert columns(item) == (9, 10)
    # The popup's item too, from the word before the cursor on.
    it.type("se")
    (item,) = await it.popup()
    assert item["textEdit"]["newText"] == METHOD
    assert item["filterText"] == "self):"
    assert columns(item) == (9, 12)
    (item,) = (await it.ask()[1])["items"]
    assert item["insertText"] == METHOD[2:]
    assert columns(item) == (11, 12)
    assert await it.ran(1) == ["finished"]


async def test_what_ends_with_the_editors_closer_replaces_nothing(typist):
    it = await typist({"after": "sum(", "text": "values)\n"}, {"text": "x"})
    it.type("total = sum")
    it.pair("()")
    (item,) = (await it.ask()[1])["items"]
    assert item["insertText"] == "values"
    assert columns(item) == (12, 12)


async def test_an_item_selected_in_the_popup_is_extended_over_closers(typist):
    it = await typist({"after": "area(self", "text": METHOD[4:] + "\n"}, {"text": "x"})
    it.type("def area")
    it.pair("()")
    it.type("se")
    start, end = ({"line": 1, "character": column} for column in (9, 11))
    selected = {"text": "self", "range": {"start": start, "end": end}}
    params = DOCUMENT | {"position": end, "context": {"triggerKind": 2, "selectedCompletionInfo": selected}}
    (item,) = (await it.client.request("textDocument/inlineCompletion", params))["items"]
    assert item["insertText"] == METHOD
    assert columns(item) == (9, 12)
