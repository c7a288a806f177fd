"""The routing table: each method once, in the file that has its name."""

import re
from pathlib import Path

import pytest
from lsprotocol import types

import midfill.lsp.handlers
from midfill.lsp.handlers.execute_command import COMMANDS
from midfill.lsp.routes import ROUTES, TEST_ROUTES

HANDLERS = Path(midfill.lsp.handlers.__file__).parent
# Methods whose handlers share a file.
SHARED = {
    **dict.fromkeys(("didOpen", "didChange", "didClose"), "notebook_document"),
    **dict.fromkeys(("documentText", "indexed", "costs"), "hooks"),
}


def file_of(method):
    kind, _, name = method.rpartition("/")
    if kind in {"notebookDocument", "midfill"} and name in SHARED:
        return SHARED[name]
    return re.sub("[A-Z]", lambda found: "_" + found.group().lower(), name)


@pytest.mark.parametrize("route", [*ROUTES, *TEST_ROUTES], ids=lambda route: route.method)
def test_a_handler_is_in_the_file_of_its_method(route):
    assert route.method.startswith("midfill/") or route.method in types.METHOD_TO_TYPES
    assert route.handler.__module__ == f"midfill.lsp.handlers.{file_of(route.method)}"


def test_each_method_is_there_once_and_no_file_is_left_over():
    methods = [route.method for route in (*ROUTES, *TEST_ROUTES)]
    assert len(methods) == len(set(methods))
    files = {path.stem for path in HANDLERS.glob("*.py")} - {"__init__", "adapter_commands"}
    assert files == {file_of(method) for method in methods}


def test_commands_are_midfills_own():
    assert all(name.startswith("midfill.") for name in COMMANDS)
