"""Notebooks: the cells are one text for the model, and answers land in the right cell."""

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")

NOTEBOOK = "file:///work/a.ipynb"


def uri(name):
    return f"vscode-notebook-cell:/work/a.ipynb#{name}"


def item(name, text, language="python"):
    return {"uri": uri(name), "languageId": language, "version": 1, "text": text}


def cell(name, kind=2):
    return {"kind": kind, "document": uri(name)}


def place(line, character):
    return {"line": line, "character": character}


def change(cells):
    return {"notebookDocument": {"uri": NOTEBOOK, "version": 2}, "change": {"cells": cells}}


@pytest.fixture
def rules():
    """The model's answer depends on the cells above, so an answer shows what it has read."""
    return [
        {"contains": "import a\n\n\nb = 2\n", "after": "a.", "text": "both()"},
        {"contains": "import a\n\n\na", "after": "a.", "text": "first()"},
        {"contains": ">b = 2\n", "after": "a.", "text": "second()"},
        {"after": "Say a.", "text": "prose"},
        {"text": "alone()"},
    ]


async def start(scripted, rules, cells=None):
    server = await scripted(*rules, initialize=False)
    result = await server.initialize(capabilities={"notebookDocument": {"synchronization": {}}})
    assert result["capabilities"]["notebookDocumentSync"] == {"notebookSelector": [{"notebook": "*"}]}
    await server.loaded()
    texts = [
        item("1", "import a\n\n"),
        item("prose", "Say a.", "markdown"),
        item("2", "b = 2"),
        item("3", "a."),
    ]
    server.notify(
        "notebookDocument/didOpen",
        {
            "notebookDocument": {
                "uri": NOTEBOOK,
                "notebookType": "jupyter-notebook",
                "version": 1,
                "cells": [cell("1"), cell("prose", 1), cell("2"), cell("3")],
            },
            "cellTextDocuments": texts,
        },
    )
    return server


async def ghost(server, name, line, character):
    params = {
        "textDocument": {"uri": uri(name)},
        "position": place(line, character),
        "context": {"triggerKind": 1},
    }
    server.request(1, "textDocument/inlineCompletion", params)
    return (await server.answer(1))["result"]["items"]


async def test_the_cells_above_are_in_the_prompt_and_the_answer_is_in_the_cell(scripted, rules):
    server = await start(scripted, rules)
    (found,) = await ghost(server, "3", 0, 2)
    assert found["insertText"] == "both()"
    assert found["range"] == {"start": place(0, 2), "end": place(0, 2)}
    server.request(2, "textDocument/completion", {"textDocument": {"uri": uri("3")}, "position": place(0, 2)})
    (popup,) = (await server.answer(2))["result"]["items"]
    assert popup["textEdit"] == {"range": {"start": place(0, 2), "end": place(0, 2)}, "newText": "both()"}


async def test_prose_is_no_part_of_the_code(scripted, rules):
    server = await start(scripted, rules)
    (found,) = await ghost(server, "prose", 0, 6)
    assert found["insertText"] == "prose"


async def test_cells_are_deleted_inserted_and_moved(scripted, rules):
    server = await start(scripted, rules)
    array = {"start": 2, "deleteCount": 1, "cells": []}
    server.notify(
        "notebookDocument/didChange", change({"structure": {"array": array, "didClose": [{"uri": uri("2")}]}})
    )
    assert (await ghost(server, "3", 0, 2))[0]["insertText"] == "first()"
    array = {"start": 0, "deleteCount": 1, "cells": [cell("new")]}
    opened = [item("new", "b = 2")]
    structure = {"array": array, "didOpen": opened, "didClose": [{"uri": uri("1")}]}
    server.notify("notebookDocument/didChange", change({"structure": structure}))
    assert (await ghost(server, "3", 0, 2))[0]["insertText"] == "second()"
    # Moved to the front: deleted and inserted in one go.
    array = {"start": 0, "deleteCount": 3, "cells": [cell("3"), cell("new"), cell("prose", 1)]}
    server.notify("notebookDocument/didChange", change({"structure": {"array": array}}))
    assert (await ghost(server, "3", 0, 2))[0]["insertText"] == "alone()"


async def test_edits_in_a_cell(scripted, rules):
    server = await start(scripted, rules)
    edit = {"range": {"start": place(0, 0), "end": place(0, 5)}, "text": ""}
    content = {
        "document": {"uri": uri("2"), "version": 2},
        "changes": [edit, {"text": "b = 2 "}, {"text": "b = 3"}],
    }
    server.notify("notebookDocument/didChange", change({"textContent": [content]}))
    assert (await ghost(server, "3", 0, 2))[0]["insertText"] == "alone()"
    # Editors that treat a cell as a document of its own too.
    params = {"textDocument": {"uri": uri("2"), "version": 3}, "contentChanges": [{"text": "b = 2"}]}
    server.notify("textDocument/didChange", params)
    assert (await ghost(server, "3", 0, 2))[0]["insertText"] == "both()"


async def test_only_metadata_changes(scripted, rules):
    server = await start(scripted, rules)
    server.notify("notebookDocument/didChange", change({"data": [cell("1")]}))
    params = {"notebookDocument": {"uri": NOTEBOOK, "version": 2}, "change": {"metadata": {"a": 1}}}
    server.notify("notebookDocument/didChange", params)
    assert (await ghost(server, "3", 0, 2))[0]["insertText"] == "both()"


async def test_closing_a_notebook_closes_its_cells(scripted, rules):
    server = await start(scripted, rules)
    server.notify(
        "notebookDocument/didClose", {"notebookDocument": {"uri": NOTEBOOK}, "cellTextDocuments": []}
    )
    for name in ("1", "prose", "2", "3"):
        server.request(3, "midfill/documentText", {"textDocument": {"uri": uri(name)}})
        assert (await server.answer(3))["error"]["code"] == -32602


async def test_a_cell_that_is_closed_as_a_document_leaves_the_others(scripted, rules):
    server = await start(scripted, rules)
    server.notify("textDocument/didClose", {"textDocument": {"uri": uri("2")}})
    assert (await ghost(server, "3", 0, 2))[0]["insertText"] == "first()"


async def test_junk_in_a_notebook_change_is_survived(scripted, rules):
    server = await start(scripted, rules)
    for array in (
        {"start": 99, "deleteCount": 99},
        {"start": -3, "deleteCount": -1},
        {"start": 0, "deleteCount": 0, "cells": None},
    ):
        server.notify("notebookDocument/didChange", change({"structure": {"array": array}}))
    other = {
        "notebookDocument": {"uri": "file:///no.ipynb", "version": 1},
        "change": {"cells": {"structure": {"array": {"start": 0, "deleteCount": 1}}}},
    }
    server.notify("notebookDocument/didChange", other)
    server.notify(
        "notebookDocument/didClose",
        {"notebookDocument": {"uri": "file:///no.ipynb"}, "cellTextDocuments": []},
    )
    assert (await ghost(server, "3", 0, 2))[0]["insertText"] == "both()"
