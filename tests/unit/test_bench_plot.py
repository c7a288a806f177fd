"""The picture of a replay."""

import pytest

from midfill.bench.backends import CANCELLED, SuggestionRequest
from midfill.bench.plot import plot
from midfill.bench.replay import BackendRun
from midfill.errors import MidfillError

pytest.importorskip("matplotlib")

SHOWN = SuggestionRequest(0, 101.0, 1, answered_s=101.2, text="a", source="model")
REUSED = SuggestionRequest(0, 103.0, 2, answered_s=103.0, text="a", source="typed-through")
GONE = SuggestionRequest(0, 104.0, 3, cancelled_s=104.1, answered_s=104.1, code=CANCELLED)


def test_several_contenders_are_drawn_below_each_other(tmp_path):
    runs = [
        BackendRun(name, [SHOWN, REUSED, GONE], begun_s=100.0)
        for name in ("midfill", "llama.cpp", "generate")
    ]
    heights = []
    for count in (1, 3):
        path = tmp_path / f"{count}.png"
        plot(runs[:count], "title", path)
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        heights.append(int.from_bytes(content[20:24]))
    assert heights[1] == 2 * heights[0]


def test_a_session_in_which_nothing_was_shown_is_drawn(tmp_path):
    plot([BackendRun("midfill", [GONE], begun_s=100.0), BackendRun("generate")], "title", tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path):
    with pytest.raises(MidfillError, match="Cannot write the picture"):
        plot([BackendRun()], "title", tmp_path / "none" / "a.png")
