"""Progress where there is no terminal."""

import pytest

from midfill.cli.terminal import ProgressLines, with_progress


class Clock:
    """A clock that only a test moves."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def printed(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_line_a_second_and_the_last_one_at_once(clock, capsys):
    lines = ProgressLines("downloading x", clock)
    for done_mb in range(101):
        lines.report(f"fetching x: {done_mb} of 100 MB", done_mb / 100)
        clock.now_s += 0.25
    seen = printed(capsys)
    assert seen == [f"fetching x: {mb} of 100 MB ({mb} %)" for mb in range(0, 101, 4)]
    # The end is said even if it comes right after another line.
    clock.now_s += 1
    lines.report("fetching x: 99 of 100 MB", 0.99)
    lines.report("fetching x: 100 of 100 MB", 1.0)
    assert printed(capsys) == ["fetching x: 99 of 100 MB (99 %)", "fetching x: 100 of 100 MB (100 %)"]


def test_a_line_is_printed_once_and_an_empty_message_is_the_title(clock, capsys):
    lines = ProgressLines("loading the model", clock)
    for _ in range(5):
        lines.report("", None)
        clock.now_s += 10
    assert printed(capsys) == ["loading the model"]


def test_the_commands_print_lines_to_stderr_where_it_is_no_terminal(capsys, monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    assert with_progress("working", lambda report: report("3 of 4 MB", 0.75)) is None
    assert printed(capsys) == ["3 of 4 MB (75 %)"]
