"""Next-edit scenarios: their format, how they are played, and how they are scored."""

from __future__ import annotations

import pytest

from midfill.errors import MidfillError
from midfill.evaluation.next_edits import (
    Result,
    Suggested,
    TextEdit,
    delta_chrf,
    describe,
    evaluate,
    offset,
    parse,
    play,
    point,
    read_scenarios,
    summarise,
)
from midfill.evaluation.records import Records
from midfill.text.documents import Point

RENAME = """A comment.
id: rename
language: python
file: area.py
row: 2
col: 12
viewportTop: 1
viewportBottom: 20
fim-row: 3
fim-col: 4
-- buffer.txt --
def area(radius):
    print(r)
    return r ** 2
-- history --
<|file|> area.py
<|old|>
def area(r):
<|new|>
def area(radius):
<|file|> other.py
<|old|>
area(r=1)
<|new|>
area(radius=1)
-- steps --
request-completion manual
accept

request-completion manual
-- expected --
def area(radius):
    print(radius)
    return radius ** 2
"""
SILENT = """id: silent
language: go
file: a.go
row: 1
col: 99
modified: true
cursor-positions: 2:0, 1:3
-- buffer.txt --
package a
-- steps --
request-completion manual
  expect !shown
"""


class Scripted:
    """An editor that gets these edits, one per request, and records what happens to its buffers."""

    model = "scripted"

    def __init__(self, *edits):
        self.edits = list(edits)
        self.log = []

    async def open(self, file, language, text):
        self.log.append(("open", file, language, text))

    async def change(self, file, text):
        self.log.append(("change", file, text))

    async def suggest(self, file, cursor):
        self.log.append(("suggest", file, cursor))
        return Suggested(self.edits.pop(0) if self.edits else None, 5.0)

    async def close_all(self):
        self.log.append(("close",))


def test_a_scenario_is_parsed():
    scenario = parse(RENAME)
    assert (scenario.id, scenario.language, scenario.file) == ("rename", "python", "area.py")
    assert (scenario.cursors, scenario.fill_at) == ((Point(1, 12),), Point(2, 4))
    assert [edit.file for edit in scenario.history] == ["area.py", "other.py"]
    assert scenario.history[0].new == "def area(radius):\n"
    assert [step[0] for step in scenario.steps] == ["request-completion", "accept", "request-completion"]
    silent = parse(SILENT)
    assert (silent.expected, silent.cursors) == (None, (Point(0, 99), Point(1, 0), Point(0, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("accept", "dance"), "the step 'dance' is not known"),
        (("id: rename\n", ""), "'id'"),
        (("row: 2", "row: two"), "two"),
        (("-- steps --", "-- stairs --"), "'steps'"),
        (("-- expected --", "-- hoped --"), "'expected'"),
    ],
)
def test_a_file_that_is_no_scenario_is_named(tmp_path, change, message):
    (tmp_path / "one.txtar").write_text(RENAME.replace(*change))
    with pytest.raises(MidfillError, match=r"one\.txtar is not a next-edit scenario") as caught:
        read_scenarios(tmp_path)
    assert message in str(caught.value)


def test_a_folder_without_scenarios_is_named(tmp_path):
    with pytest.raises(MidfillError, match=r"has no \.txtar files"):
        read_scenarios(tmp_path)
    with pytest.raises(MidfillError, match="is not a folder"):
        read_scenarios(tmp_path / "none")


async def test_earlier_edits_are_made_in_the_editor_and_suggestions_accepted():
    scenario = parse(RENAME)
    first = TextEdit(Point(1, 10), Point(1, 11), "radius")
    second = TextEdit(Point(2, 11), Point(2, 12), "radius")
    editor = Scripted(first, second)
    result = await play(scenario, editor)
    assert editor.log[:2] == [
        ("open", "other.py", "python", "area(r=1)\n"),
        ("change", "other.py", "area(radius=1)\n"),
    ]
    assert editor.log[2] == ("open", "area.py", "python", scenario.text.replace("(radius)", "(r)", 1))
    assert editor.log[3] == ("change", "area.py", scenario.text)
    assert editor.log[4] == ("suggest", "area.py", Point(2, 4))
    # The next request is where the accepted edit ends.
    assert editor.log[6] == ("suggest", "area.py", Point(1, 16))
    assert result.text == scenario.expected
    assert (result.shown, result.delta_chrf, result.latencies_ms) == (True, 100.0, (5.0, 5.0))


async def test_a_silent_scenario_is_tried_at_each_cursor():
    scenario = parse(SILENT)
    editor = Scripted()
    assert not (await play(scenario, editor)).shown
    assert [entry[2] for entry in editor.log if entry[0] == "suggest"] == list(scenario.cursors)
    late = Scripted(None, None, TextEdit(Point(0, 0), Point(0, 0), "x"))
    assert (await play(scenario, late)).shown


def test_agreement_is_that_of_the_changed_lines():
    before, expected = "a\nb\nc\n", "a\nlonger line\nc\n"
    assert delta_chrf(before, expected, expected) == 100.0
    assert delta_chrf(before, before, expected) == 0.0
    assert delta_chrf(before, before, before) == 100.0
    near, far = (
        delta_chrf(before, "a\nlonger lime\nc\n", expected),
        delta_chrf(before, "a\nxyz\nc\n", expected),
    )
    assert 50 < near < 100
    assert far == 0.0
    # "ab" against "abc": order 1 has precision 1 and recall 2/3, order 2 has 1 and 1/2, and order 3 none.
    weighted = [5 * (2 / 3) / (4 + 2 / 3), 5 * (1 / 2) / (4 + 1 / 2), 0.0]
    assert delta_chrf("", "ab", "abc") == pytest.approx(100 * sum(weighted) / 3)


@pytest.mark.parametrize(("at", "index"), [((0, 0), 0), ((0, 9), 2), ((1, 1), 4), ((2, 0), 6), ((9, 9), 6)])
def test_points_are_clipped_to_the_text(at, index):
    text = "ab\ncd\n"
    assert offset(text, Point(*at)) == index
    assert offset(text, point(text, index)) == index


async def test_results_are_summarised_and_kept():
    records = Records(None, {})
    shares = []
    edits = [TextEdit(Point(1, 10), Point(1, 11), "radius"), TextEdit(Point(2, 11), Point(2, 12), "radius")]
    await evaluate([parse(RENAME), parse(SILENT)], Scripted(*edits), records, shares.append)
    summary = summarise([Result(**row) for row in records.rows.values()])
    assert (summary["score"], summary["shown"], summary["quiet"]) == (1.0, 1.0, 1.0)
    assert shares == [0.5, 1.0]
    text = describe(summary | {"model": "m"})
    assert "silent, as it should be" in text
    assert text.endswith("score 1.000, shown 100.0%, quiet 100.0%; latency p50 5 ms, p95 5 ms")
    only = summarise([Result("s", True, True, 0.0, "", (1.0,))])
    assert (only["score"], only["quiet"]) == (None, 0.0)
    assert "not silent" in describe(only | {"model": "m"})
