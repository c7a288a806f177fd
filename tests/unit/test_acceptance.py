import json
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midfill.completion.stats import acceptance as feedback
from midfill.completion.stats.acceptance import (
    AcceptanceCounts,
    AcceptanceStats,
    add,
    as_dict,
    difference,
    is_held_out,
    key_of,
    read,
    read_sessions,
)
from midfill.errors import MidfillError
from midfill.text.documents import Change, Document, Encoding, Point

URI = "file:///a.py"


class Editor:
    """A document, what is offered in it, and a clock."""

    def __init__(self, text="x = \ny = 2\n"):
        self.feedback = AcceptanceStats()
        self.document = Document.open(URI, "python", 1, text)
        self.now_s = 100.0

    def offer(self, line, column, text, num_replaced=0):
        return self.feedback.shown(self.document, Point(line, column), text, "m", num_replaced)

    def edit(self, start, end, text):
        ends = Point(*start), Point(*end)
        self.feedback.edit(URI, *ends, text, self.now_s)
        self.document = self.document.edit([Change(text, start, end)], 2, Encoding.UTF32)

    def type(self, line, column, text):
        for at, char in enumerate(text):
            self.edit((line, column + at), (line, column + at), char)

    def wait(self, seconds):
        self.now_s += seconds
        return self.feedback.check({URI: self.document}, self.now_s)

    def counts(self):
        """Those that are not 0."""
        table = self.feedback.collect()
        total = AcceptanceCounts()
        for counts in table.get("m", {}).values():
            total.add(counts)
        return {name: value for name, value in as_dict({"m": {"": total}})["m"][""].items() if value}


def test_the_items_command_counts_once():
    editor = Editor()
    id_ = editor.offer(0, 4, "compute(1)")
    editor.edit((0, 4), (0, 4), "compute(1)")
    editor.feedback.accept(id_, editor.now_s)
    editor.feedback.accept(id_, editor.now_s)
    assert editor.counts() == {"offered": 1, "accepted": 1, "accepted_chars": 10}


def test_the_command_may_come_before_the_edit():
    editor = Editor()
    editor.feedback.accept(editor.offer(0, 4, "compute(1)"), editor.now_s)
    editor.edit((0, 4), (0, 4), "compute(1)")
    editor.wait(30)
    assert editor.counts() == {
        "offered": 1, "accepted": 1, "accepted_chars": 10, "checked_30s": 1, "kept_30s": 1,
    }  # fmt: skip


def test_editors_that_run_no_command_are_found_out_by_the_edit():
    editor = Editor()
    editor.offer(0, 4, "compute(1)")
    editor.edit((0, 4), (0, 4), "compute(1)")
    assert editor.counts() == {"offered": 1, "accepted": 1, "accepted_chars": 10}


def test_an_edit_that_replaces_the_word_before_the_cursor_too():
    editor = Editor("x = comp\n")
    editor.offer(0, 8, "ute(1)\nz = 3")
    editor.edit((0, 4), (0, 8), "compute(1)\r\nz = 3")
    editor.wait(30)
    assert editor.counts() == {
        "offered": 1, "accepted": 1, "accepted_chars": 12, "checked_30s": 1, "kept_30s": 1,
    }  # fmt: skip


def test_an_edit_that_replaces_a_closer_behind_the_cursor_too():
    editor = Editor("def f()\ny = 2\n")
    editor.offer(0, 6, "a, b):\n    c", num_replaced=1)
    editor.type(0, 6, "a")
    editor.edit((0, 7), (0, 8), ", b):\n    c")
    assert editor.counts() == {"offered": 1, "accepted": 1, "accepted_chars": 11}
    editor.wait(30)
    assert editor.counts() == {"checked_30s": 1, "kept_30s": 1}


def test_a_word_of_it():
    editor = Editor()
    editor.offer(0, 4, "compute(1, 2)")
    editor.edit((0, 4), (0, 4), "compute")
    editor.edit((0, 11), (0, 11), "(1")
    editor.edit((0, 13), (0, 13), "!")
    assert editor.counts() == {"offered": 1, "partly_accepted": 1, "accepted_chars": 9}


def test_word_by_word_to_the_end():
    editor = Editor()
    editor.offer(0, 4, "compute(12)")
    editor.edit((0, 4), (0, 4), "compute")
    editor.edit((0, 11), (0, 11), "(12)")
    assert editor.counts() == {"offered": 1, "partly_accepted": 1, "accepted": 1, "accepted_chars": 11}


def test_typing_through_is_one_offer_and_no_acceptance():
    editor = Editor()
    for at in range(len("compute(1)")):
        editor.offer(0, 4 + at, "compute(1)"[at:])
        editor.type(0, 4 + at, "compute(1)"[at])
    assert editor.counts() == {"offered": 1}


def test_other_text_is_no_acceptance():
    editor = Editor()
    editor.offer(0, 4, "compute(1)")
    editor.edit((0, 4), (0, 4), "other(2)")
    editor.edit((0, 4), (0, 4), "compute(1)")
    assert editor.counts() == {"offered": 1}


def test_an_accepted_text_that_moves_and_is_changed_a_little_is_kept():
    editor = Editor()
    editor.offer(0, 4, "compute(first, second)")
    editor.edit((0, 4), (0, 4), "compute(first, second)")
    editor.edit((0, 0), (0, 0), "import os\n\n")
    editor.edit((2, 12), (2, 17), "1")
    assert editor.wait(29.5) == pytest.approx(130)
    assert "checked_30s" not in editor.counts()
    assert editor.wait(0.5) == pytest.approx(400)
    editor.edit((2, 0), (2, 6), "z = new + ")
    editor.wait(270)
    assert editor.counts() == {"checked_30s": 1, "kept_30s": 1, "checked_5min": 1, "kept_5min": 1}


def test_an_accepted_text_that_is_deleted_is_not_kept():
    editor = Editor()
    editor.offer(0, 4, "compute(1)")
    editor.edit((0, 4), (0, 4), "compute(1)")
    editor.wait(30)
    editor.edit((0, 4), (0, 14), "")
    assert editor.wait(270) is None
    assert editor.counts() == {
        "offered": 1, "accepted": 1, "accepted_chars": 10, "checked_30s": 1, "kept_30s": 1, "checked_5min": 1,
    }  # fmt: skip


def test_a_closed_document_is_not_looked_at():
    editor = Editor()
    editor.offer(0, 4, "compute(1)")
    editor.edit((0, 4), (0, 4), "compute(1)")
    editor.feedback.close(URI)
    assert not editor.feedback.follows(URI)
    assert editor.wait(400) is None
    assert "checked_30s" not in editor.counts()


def test_what_is_remembered_is_bounded():
    editor = Editor()
    for n in range(1000):
        editor.feedback.accept(editor.offer(0, 4, f"call({n})"), editor.now_s)
    assert len(editor.feedback._suggestions) <= 16
    assert len(editor.feedback._watched) <= 256


@given(
    lines=st.lists(st.text("ab\U0001f642 ", max_size=4), min_size=1, max_size=6),
    edits=st.lists(st.tuples(*[st.integers(0, 6)] * 4, st.text("ab\n", max_size=4)), max_size=4),
)
def test_two_versions_as_one_edit(lines, edits):
    before = after = Document.open(URI, "python", 1, "\n".join(lines))
    for *places, text in edits:
        start, end = sorted(
            (after.point(tuple(places[:2]), Encoding.UTF32), after.point(tuple(places[2:]), Encoding.UTF32))
        )
        change = Change(text, (start.line, start.column), (end.line, end.column))
        after = after.edit([change], 2, Encoding.UTF32)
    start, end, text = difference(before, after)
    change = Change(text, (start.line, start.column), (end.line, end.column))
    assert before.edit([change], 2, Encoding.UTF32).text == after.text


def test_an_accepted_text_is_followed_through_random_edits_elsewhere():
    rng = random.Random(3)
    for _ in range(50):
        editor = Editor("".join(f"line {n}\n" for n in range(20)))
        editor.offer(10, 3, "MARKED_TEXT")
        editor.edit((10, 3), (10, 3), "MARKED_TEXT")
        for _ in range(10):
            at = next(n for n, line in enumerate(editor.document.lines) if "MARKED_TEXT" in line)
            line = rng.randrange(at + 1)
            end = (line, 0) if line == at else (min(line + rng.randrange(3), at - 1), 1)
            editor.edit((line, 0), end, rng.choice(["", "a", "b\nc\n"]))
        editor.wait(30)
        assert editor.counts()["kept_30s"] == 1


def test_counts_of_two_servers_add_up(tmp_path):
    path = tmp_path / "deep" / "feedback.json"
    assert read(path) == {}
    one = {"m": {"python": AcceptanceCounts(offered=1)}}
    threads = [threading.Thread(target=lambda: [add(path, one) for _ in range(20)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    add(path, {"m": {"go": AcceptanceCounts(accepted=2)}, "other": {"go": AcceptanceCounts(offered=3)}})
    assert as_dict(read(path))["m"]["python"]["offered"] == 40
    assert read(path)["m"]["go"] == AcceptanceCounts(accepted=2)
    assert {file.name for file in path.parent.iterdir()} <= {"feedback.json", "feedback.lock"}


def test_the_file_holds_numbers_only(tmp_path):
    editor = Editor()
    editor.offer(0, 4, "secret_name(1)")
    editor.edit((0, 4), (0, 4), "secret_name(1)")
    path = tmp_path / "feedback.json"
    add(path, editor.feedback.collect())
    stored = json.loads(path.read_text())["counts"]
    assert set(stored["m"]["python"]) == set(AcceptanceCounts.__dataclass_fields__)
    assert "secret" not in path.read_text()


@pytest.mark.parametrize("content", ["", "[]", '{"counts": {"m": {"go": {"wrong": 1}}}}', '{"counts": 3}'])
def test_a_damaged_file_is_named_and_kept(tmp_path, content):
    path = tmp_path / "feedback.json"
    path.write_text(content)
    with pytest.raises(MidfillError, match=r"feedback\.json.*delete the file"):
        add(path, {"m": {"go": AcceptanceCounts(offered=1)}})
    assert path.read_text() == content


def test_a_tenth_of_sessions_is_held_out_by_their_ids_alone():
    held_out = [number for number in range(5000) if is_held_out(f"session-{number}")]
    assert 400 < len(held_out) < 600
    assert held_out == [number for number in range(5000) if is_held_out(f"session-{number}")]


def test_counts_of_adapters_are_kept_by_session_too(tmp_path, monkeypatch):
    monkeypatch.setattr(feedback, "_MOST_SESSIONS", 2)
    path = tmp_path / "feedback.json"
    mine, held = key_of("m", "mine"), key_of("m", "mine", held_out=True)
    one = {"python": AcceptanceCounts(offered=3, accepted=1), "rust": AcceptanceCounts(offered=1)}
    add(path, {"m": one, mine: one}, "first")
    add(path, {held: one}, "second")
    add(path, {mine: one}, None)
    assert read_sessions(path) == {
        "first": {mine: AcceptanceCounts(offered=4, accepted=1)},
        "second": {held: AcceptanceCounts(offered=4, accepted=1)},
    }
    assert read(path)[mine]["python"] == AcceptanceCounts(offered=6, accepted=2)
    add(path, {mine: one}, "third")
    assert list(read_sessions(path)) == ["second", "third"]
    assert feedback.with_and_without(held) == (mine, True)
    assert feedback.with_and_without(mine) == (mine, False)


async def test_counts_that_cannot_be_written_are_kept_for_the_next_time(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "state"
    # A file where the folder should be: nothing can be written, whoever one is.
    folder.write_text("")
    monkeypatch.setenv("MIDFILL_STATE", str(folder))
    document = Document.open("file:///a.py", "python", 1, "x = ")
    journal = feedback.AcceptanceTracker({document.uri: document})
    journal.counts = True
    for count in (1, 2):
        journal.shown(document, Point(0, count), "1 + 1", "model")
        await journal.write()
    assert caplog.text.count("Cannot write the acceptance counts") == 1
    folder.unlink()
    await journal.write()
    written = feedback.read(folder / "feedback.json")
    assert written["model"]["python"].offered == 2
    # They are not written twice.
    journal.end()
    assert feedback.read(folder / "feedback.json") == written
