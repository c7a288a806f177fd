"""What others have named or written is text to terminals, logs and editors, and never a command."""

import io
import logging
import re

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from lsprotocol import types

from midfill import errors
from midfill.cli.doctor_checks import Check
from midfill.cli.engine_check import Findings, table
from midfill.cli.terminal import say, show, terminal
from midfill.engine.remote.client import dialects as wire
from midfill.errors import EngineError, MidfillError
from midfill.lsp.server import MidfillServer
from midfill.system.printable import LogFormatter, one_line, printable, shown

HOSTILE = [
    *(
        "\x1b]0;PWNED\x07",
        "\x1b[2J\x1b[31m",
        "\x9b31m",
        "a\x08\x08b",
        "a\rb",
        "a\nb",
        "a\r\nb",
        "a\x85b",
        "a\u2028b",
    ),
    *(
        "\u202eevil\u202c",
        "\u2066x\u2069",
        "\u200b\u200d\ufeff",
        "\U000e0041",
        "\udc80",
        "\x00",
        "\x7f",
        "\ue000",
    ),
]
MARKUP = ["[/x]", "[bold]x[/bold]", "[link=https://example.org]x[/link]", "[", "[/]", ":smile:", "[red"]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_is_shown_is_one_printable_line(text):
    for made in (shown(text), one_line(text), str(MidfillError(text)), str(EngineError(f"It said {text}."))):
        assert made.isprintable()
        assert made


@given(st.text(max_size=300))
def test_any_text_is_shown_as_printable(text):
    assert shown(text).isprintable()
    assert len(shown(text)) <= 200
    assert all(mark.isprintable() or mark in "\n\t" for mark in printable(text))
    if text.isprintable():
        assert printable(text) == text


def test_a_long_text_is_cut_and_says_so():
    assert shown("x" * 10_000) == "x" * 199 + "…"
    assert len(str(MidfillError("x" * 10_000_000))) == 2000
    assert shown("naïve — 日本語 🐍") == "naïve — 日本語 🐍"


@pytest.mark.parametrize("kind", [one for one in vars(errors).values() if isinstance(one, type)])
def test_every_error_of_ours_is_a_printable_sentence(kind):
    if issubclass(kind, Exception):
        assert str(kind("what\x1b[2J\nhappened")) == "what\\x1b[2J happened"


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_record_of_the_log_is_one_line_without_commands(text):
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(LogFormatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.Logger("midfill.test")
    logger.addHandler(handler)
    logger.warning("the engine failed: %s", text)
    (line,) = out.getvalue().removesuffix("\n").split("\n")
    assert line.isprintable()
    try:
        {}[text]
    except KeyError:
        logger.exception("loading failed")
    try:
        bytes(text, "utf-8", text)
    except (LookupError, ValueError):
        logger.exception("loading failed")
    assert all(mark.isprintable() or mark == "\n" for mark in out.getvalue())


@pytest.mark.parametrize("text", [*HOSTILE, *MARKUP], ids=ascii)
def test_names_of_a_server_are_text_in_a_table(text, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    findings = Findings([Check("model", "ok", f"{text}, 100 tokens", text), Check(text, "error", "x", "")])
    terminal().print(table(findings))
    show({"a": text}, lambda result: f"first {result['a']}\nsecond", as_json=False)
    say(f"says {text}")
    printed = capsys.readouterr().out
    assert all(mark.isprintable() or mark in "\n\t" for mark in printed)
    if text in MARKUP:
        assert printed.count(text) == 5


@pytest.mark.parametrize("text", [*HOSTILE, *MARKUP], ids=ascii)
def test_an_error_of_a_server_reaches_nobody_as_it_is(text):
    piece = wire._read_midfill({"error": {"message": text + "x" * 10_000}})
    assert piece.error.isprintable()
    assert len(piece.error) <= 200


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_message_in_the_editor_is_printable(text, monkeypatch):
    sent = []
    monkeypatch.setattr(
        MidfillServer.__mro__[1], "window_show_message", lambda _, params: sent.append(params)
    )
    server = MidfillServer.__new__(MidfillServer)
    server.window_show_message(types.ShowMessageParams(types.MessageType.Error, f"midfill: {text}"))
    (message,) = sent
    assert all(mark.isprintable() or mark in "\n\t" for mark in message.message)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_is_under_way_is_printable(text, capsys, monkeypatch):
    from midfill.cli.terminal import with_progress

    monkeypatch.setenv("FORCE_COLOR", "1")
    with_progress(f"fetching {text}", lambda report: report(f"file {text}", 0.5))
    drawn = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", capsys.readouterr().err.replace(shown(text), ""))
    assert all(mark.isprintable() or mark == "\n" for mark in drawn)
    assert "PWNED" not in drawn


def test_progress_takes_no_markup_from_a_title():
    from midfill.cli.terminal import with_progress

    def work(report):
        report("[/x] [link=https://example.org]", 0.5)
        return 7

    assert with_progress("fetching [/x]", work) == 7


def test_the_command_line_prints_an_error_as_one_line(tmp_path):
    from midfill.cli.main import cli

    result = CliRunner().invoke(cli, ["model", "path", "no\x1b[2Jmodel\nat all"])
    assert isinstance(result.exception, MidfillError)
    assert str(result.exception).isprintable()
