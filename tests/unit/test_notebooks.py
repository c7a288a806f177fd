"""Which text a cell is part of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midfill.text.documents import Document, Point, Snapshot
from midfill.text.notebooks import Notebooks

NOTEBOOK = "file:///a.ipynb"


def cell(uri, text, language="python"):
    return Document.open(uri, language, 1, text)


def whole(notebooks, documents, uri, line=0, column=0):
    return notebooks.whole(Snapshot(documents[uri], Point(line, column)), documents)


@pytest.fixture
def documents():
    cells = [
        cell("1", "import a"),
        cell("prose", "Words.", "markdown"),
        cell("2", "b = 2\n"),
        cell("3", "a.b"),
    ]
    return {document.uri: document for document in cells}


@pytest.fixture
def notebooks(documents):
    notebooks = Notebooks()
    notebooks.open(NOTEBOOK, documents)
    return notebooks


def test_cells_of_one_language_are_one_text(notebooks, documents):
    found = whole(notebooks, documents, "2", column=3)
    assert found.document.text == "import a\nb = 2\n\na.b"
    assert found.cursor == Point(1, 3)
    assert (found.document.uri, found.document.num_chars) == ("2", len(found.document.text))
    assert whole(notebooks, documents, "prose").document.text == "Words."


def test_a_document_that_is_no_cell_stays_as_it_is(notebooks, documents):
    documents["file:///x.py"] = cell("file:///x.py", "x")
    snapshot = Snapshot(documents["file:///x.py"], Point(0, 1))
    assert notebooks.whole(snapshot, documents) is snapshot


def test_a_snapshot_is_joined_with_its_own_version_of_the_cell(notebooks, documents):
    old = Snapshot(documents["3"], Point(0, 3))
    documents["3"] = cell("3", "changed")
    assert notebooks.whole(old, documents).document.text.endswith("\na.b")


def test_cells_that_are_not_open_are_left_out(notebooks, documents):
    del documents["1"]
    assert whole(notebooks, documents, "3").document.text == "b = 2\n\na.b"


def test_the_cells_line_ends_are_kept(notebooks, documents):
    documents["2"] = cell("2", "b = 2\r\n")
    assert whole(notebooks, documents, "2").document.lines == ["import a\r\n", "b = 2\r\n", "\r\n", "a.b"]


def test_a_closed_notebook_gives_its_cells_back(notebooks, documents):
    assert notebooks.close(NOTEBOOK) == ["1", "prose", "2", "3"]
    assert notebooks.close(NOTEBOOK) == []
    assert whole(notebooks, documents, "3").document.text == "a.b"


def test_a_cell_named_twice_counts_once_for_the_cursor(documents):
    notebooks = Notebooks()
    notebooks.open(NOTEBOOK, ["1", "3", "3"])
    assert whole(notebooks, documents, "3").cursor == Point(1, 0)


splices = st.tuples(
    st.integers(-2, 6), st.integers(-2, 6), st.lists(st.sampled_from("1234567"), max_size=3, unique=True)
)


@given(st.lists(splices, max_size=8))
def test_any_run_of_splices_keeps_the_order_of_a_list(edits):
    notebooks, naive = Notebooks(), []
    documents = {uri: cell(uri, f"{uri}\n{uri}") for uri in "1234567"}
    notebooks.open(NOTEBOOK, [])
    for wanted, deleted, chosen in edits:
        start = max(0, min(wanted, len(naive)))
        kept = naive[:start], naive[max(start, start + deleted) :]
        # A client moves cells; it does not copy them.
        new = [uri for uri in chosen if uri not in kept[0] + kept[1]]
        notebooks.splice(NOTEBOOK, start, deleted, new)
        naive = kept[0] + new + kept[1]
    for index, uri in enumerate(naive):
        found = whole(notebooks, documents, uri, line=1, column=1)
        assert found.document.text == "\n".join(f"{uri}\n{uri}" for uri in naive)
        assert found.cursor == Point(2 * index + 1, 1)
    for uri in set(documents) - set(naive):
        assert whole(notebooks, documents, uri).document is documents[uri]
