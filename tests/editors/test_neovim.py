"""The Neovim plugin in the real Neovim, with the real server.

MIDFILL_TEST_NVIM names another Neovim: the scenes have passed in 0.10 and 0.12 too.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import Hostile
from real_terminal import FUTURE, FUTURE_SERVER, serve_command

SUM = {"after": "total = ", "text": "sum(values)"}
BODY = {"after": "def area(self):\n", "text": "    width = self.w\n    return width"}
VALUES = "values = [1, 2]"
PATIENT = {"popup_budget_ms": 10_000}
TRIGGERED = "<Cmd>lua require('midfill').trigger()<CR>"


def test_ghost_text_is_shown_and_accepted(neovim):
    editor = neovim(SUM, text=VALUES)
    editor.press("ototal = ")
    editor.sees("sum(values)")
    assert "total = sum(values)" in editor.screen
    assert editor.cursor == (2, 8)
    editor.press("<Tab>")
    editor.reads("values = [1, 2]\ntotal = sum(values)")
    assert editor.cursor == (2, 19)
    editor.press("<Esc>u")
    editor.reads("values = [1, 2]\ntotal = ")


def test_ghost_text_of_several_lines(neovim):
    editor = neovim(BODY, text="class Box:\n\n# end")
    editor.lua("vim.bo.autoindent = false vim.bo.indentexpr = ''")
    editor.press("jidef area(self):<CR>")
    editor.sees("    width = self.w\n    return width")
    assert editor.screen[1:5] == ["def area(self):", "    width = self.w", "    return width", "# end"]
    editor.press("<Tab>")
    editor.reads("class Box:\ndef area(self):\n    width = self.w\n    return width\n# end")
    assert editor.cursor == (4, 16)


def test_lines_below_are_shown_before_what_stands_behind_the_cursor(neovim):
    editor = neovim({"after": "f(", "text": "a,\n  b"}, text="f()")
    # Drawn by itself: which suggestions are of use inside brackets is the server's matter.
    editor.press("A<Left>")
    editor.lua(
        "local server = require('midfill.server') server.call = function(_, method, _, _, answered) "
        "if method == 'request' then vim.schedule(function() "
        "answered(nil, {items = {{insertText = 'a,\\n  b'}}}) end) return true, 1 end end"
    )
    editor.press(TRIGGERED)
    editor.sees("a,\n  b)")
    assert editor.screen[:2] == ["f(a,", "  b)"]
    editor.press("<Tab>")
    editor.reads("f(a,\n  b)")


def test_a_word_and_a_line_are_accepted(neovim):
    editor = neovim(BODY, SUM, text="")
    editor.lua("vim.bo.autoindent = false vim.bo.indentexpr = ''")
    editor.press("idef area(self):<CR>")
    editor.until(lambda: "return" in editor.ghost, "ghost text")
    editor.press("<C-Right>")
    editor.until(lambda: editor.text.endswith("    width"), "the first word")
    assert editor.ghost == " = self.w\n    return width"
    editor.press("<C-Right>")
    editor.until(lambda: editor.text.endswith("width ="), "a sign")
    editor.press("<M-Right>")
    editor.until(lambda: editor.text.endswith("width = self.w"), "the rest of the line")
    assert editor.ghost == "\n    return width"
    editor.press("<M-Right>")
    editor.reads("def area(self):\n    width = self.w\n    return width")
    assert editor.ghost == ""


def test_a_word_ends_before_a_line_end(neovim):
    editor = neovim({"after": "def area", "text": "(self):\n    return 1"}, text="")
    editor.press("idef area")
    editor.sees("(self):\n    return 1")
    editor.press("<C-Right><C-Right><C-Right>")
    editor.reads("def area(self):")
    assert editor.ghost == "\n    return 1"
    editor.press("<C-Right>")
    editor.reads("def area(self):\n    return")


def test_typing_through_a_suggestion_shortens_it_at_once_and_asks_nobody(neovim):
    editor = neovim(SUM, text=VALUES)
    editor.press("ototal = ")
    editor.sees("sum(values)")
    editor.until(lambda: editor.model_calls, "the end of the model's work")
    calls, asked = editor.model_calls, num_requests(editor)
    for index, key in enumerate("sum(val"):
        # Looked at in the turn of the key itself, in which no answer of the server can be read.
        editor.lua(
            "vim.api.nvim_create_autocmd('TextChangedI', {once = true, callback = function() "
            "SEEN = vim.api.nvim_buf_get_extmarks(0, vim.api.nvim_get_namespaces().midfill, 0, -1, "
            "{details = true})[1][4].virt_text[1][1] end})"
        )
        editor.press(key)
        rest = "sum(values)"[index + 1 :]
        editor.until(lambda rest=rest: editor.lua("return SEEN") == rest, f"{rest!r} at the key")
    assert editor.model_calls == calls
    assert num_requests(editor) == asked
    editor.press("<BS>")
    editor.sees("lues)")
    editor.press("<Tab>")
    editor.reads(VALUES + "\ntotal = sum(values)")
    assert editor.model_calls[: len(calls)] == calls


# As plugins such as nvim-autopairs do.
AUTOPAIRS = "vim.keymap.set('i', '(', '()<C-g>U<Left>') vim.keymap.set('i', '[', '[]<C-g>U<Left>')"
METHOD = {"after": "def area", "text": "(self, by):\n    return self.w"}


def test_a_bracket_that_is_closed_by_itself_takes_nothing_away(neovim):
    editor = neovim(METHOD, text="class Box:\n\n# end", before=AUTOPAIRS)
    editor.lua("vim.bo.autoindent = false vim.bo.indentexpr = ''")
    editor.press("jidef area")
    editor.until(lambda: "def area(self, by):" in editor.screen, "ghost text")
    editor.until(lambda: editor.model_calls, "the end of the model's work")
    asked = num_requests(editor)
    editor.press("(")
    editor.until(lambda: editor.text.split("\n")[1] == "def area()", "the closed bracket")
    assert editor.screen[1:4] == ["def area(self, by):", "    return self.w", "# end"]
    editor.press("se")
    editor.until(lambda: editor.text.split("\n")[1] == "def area(se)", "more keys")
    assert editor.screen[1:4] == ["def area(self, by):", "    return self.w", "# end"]
    assert num_requests(editor) == asked
    # Parts of it, up to the bracket and over it.
    editor.press("<C-Right>")
    editor.until(lambda: editor.text.split("\n")[1] == "def area(self)", "the rest of the word")
    editor.press("<M-Right>")
    editor.until(lambda: editor.text.split("\n")[1] == "def area(self, by):", "the rest of the line")
    assert editor.screen[1:4] == ["def area(self, by):", "    return self.w", "# end"]
    editor.press("<Tab>")
    editor.reads("class Box:\ndef area(self, by):\n    return self.w\n# end")
    assert editor.cursor == (3, 17)


def test_brackets_in_strings_and_characters_of_many_bytes_before_a_closed_bracket(neovim):
    pairs = AUTOPAIRS + """ vim.keymap.set('i', '"', '""<C-g>U<Left>')"""
    editor = neovim({"after": "é = f", "text": '("é(", x)\n'}, text="x = 1", before=pairs)
    editor.press("oé = f")
    editor.sees('("é(", x)')
    editor.until(lambda: editor.model_calls, "the end of the model's work")
    asked = num_requests(editor)
    editor.press('("')
    editor.until(lambda: editor.text == 'x = 1\né = f("")', "the closed bracket and quote")
    assert editor.screen[1] == 'é = f("é(", x)'
    assert num_requests(editor) == asked
    editor.press("<Tab>")
    editor.reads('x = 1\né = f("é(", x)')


def test_an_item_that_goes_on_behind_a_closed_bracket(neovim):
    rule = {"after": "def area(", "text": METHOD["text"][1:]}
    editor = neovim(rule, text="class Box:\n\n# end", before=AUTOPAIRS)
    editor.lua("vim.bo.autoindent = false vim.bo.indentexpr = ''")
    editor.press("jidef area(")
    editor.until(lambda: "def area(self, by):" in editor.screen, "ghost text")
    assert editor.text.split("\n")[1] == "def area()"
    assert editor.screen[1:4] == ["def area(self, by):", "    return self.w", "# end"]
    editor.press("<Tab>")
    editor.reads("class Box:\ndef area(self, by):\n    return self.w\n# end")
    editor.press("<Esc>u")
    editor.reads("class Box:\ndef area()\n# end")


def test_closed_brackets_that_end_up_on_a_later_line(neovim):
    editor = neovim({"after": "f([", "text": "\n    1,"}, text="x = 1", before=AUTOPAIRS)
    editor.lua("vim.bo.autoindent = false vim.bo.indentexpr = ''")
    editor.press("of([")
    editor.until(lambda: "    1,])" in editor.screen, "ghost text")
    assert editor.text == "x = 1\nf([])"
    assert editor.screen[1:3] == ["f([", "    1,])"]
    # Drawn by itself: the server would leave out what comes after a dedent.
    editor.lua(
        "local server = require('midfill.server') server.call = function(_, method, _, _, answered) "
        "if method == 'request' then vim.schedule(function() answered(nil, {items = {{"
        "insertText = '\\n    1,\\n], key=2)\\n', range = {start = {line = 1, character = 3}, "
        "['end'] = {line = 1, character = 5}}, data = {closers = {{-1, 8}, {-1, 16}}}}}}) end) "
        "return true, 1 end end"
    )
    editor.press(TRIGGERED)
    editor.until(lambda: "], key=2)" in editor.screen, "ghost text")
    assert editor.screen[1:5] == ["f([", "    1,", "], key=2)", ""]
    editor.press("<Tab>")
    editor.reads("x = 1\nf([\n    1,\n], key=2)\n")


def test_typing_on_takes_the_request_back(neovim):
    slow = {"after": "first = ", "text": "1" * 100, "token_delay_s": 0.3}
    editor = neovim(slow, {"after": "second = ", "text": "2"}, text="# here")
    editor.press("ofirst = ")
    editor.until(lambda: editor.lua("return require('midfill.ghost').is_waiting()"), "a request")
    editor.press("x<CR>second = ")
    editor.sees("2")
    editor.until(lambda: "cancelled" in editor.model_calls, "the cancelled request")
    assert editor.lua("return require('midfill').statusline()") == "midfill"


def test_columns_behind_characters_of_many_bytes(neovim):
    editor = neovim({"after": 'face = "🙂é" + ', "text": "str(é) + 1"}, text=VALUES)
    editor.press('oface = "🙂é" + ')
    editor.sees("str(é) + 1")
    editor.press("<C-Right>")
    editor.until(lambda: editor.text.endswith('face = "🙂é" + str'), "the first word")
    editor.press("<C-Right><C-Right>")
    editor.until(lambda: editor.text.endswith('face = "🙂é" + str(é'), "the word of two bytes")
    editor.press("<Tab>")
    editor.reads(VALUES + '\nface = "🙂é" + str(é) + 1')


def test_a_server_that_counts_in_utf_16(neovim):
    before = (
        "local make = vim.lsp.protocol.make_client_capabilities\n"
        "vim.lsp.protocol.make_client_capabilities = function() local all = make() "
        "all.general.positionEncodings = {'utf-16'} return all end"
    )
    editor = neovim({"after": 'face = "🙂" + ', "text": "str(1)"}, text=VALUES, before=before)
    assert editor.lua("return require('midfill.server').client().offset_encoding") == "utf-16"
    editor.press('oface = "🙂" + ')
    editor.sees("str(1)")
    editor.press("<Tab>")
    editor.reads(VALUES + '\nface = "🙂" + str(1)')


def test_files_with_windows_line_ends(neovim):
    editor = neovim(BODY, text="# first\r\n")
    assert editor.lua("return vim.bo.fileformat") == "dos"
    editor.lua("vim.bo.autoindent = false vim.bo.indentexpr = ''")
    editor.press("odef area(self):<CR>")
    editor.sees("    width = self.w\n    return width")
    editor.press("<Tab>")
    editor.reads("# first\ndef area(self):\n    width = self.w\n    return width")


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize(
    ("typed", "word"), [("total = ", "sum(a for a in values)"), ("total = su", "sum(a for a in values)")]
)
def test_popup_items_in_neovims_own_menu(neovim, enabled, typed, word):
    """By omnifunc, with `vim.lsp.completion` on or off."""
    rule = {"after": typed, "text": word.removeprefix("su" if typed.endswith("su") else "")}
    editor = neovim(rule, text=VALUES, options="popup = true", settings=PATIENT)
    editor.lua("vim.o.completeopt = 'menuone,noselect'")
    if enabled and editor.lua("return vim.lsp.completion == nil"):
        pytest.skip("Neovim has had vim.lsp.completion since 0.11")
    if enabled:
        editor.lua("vim.lsp.completion.enable(true, require('midfill.server').client().id, 0)")
    editor.press(f"o{typed}<C-x><C-o>")
    editor.until(lambda: editor.lua("return vim.fn.pumvisible()") == 1, "the popup menu")
    words = [item["word"] for item in editor.lua("return vim.fn.complete_info().items")]
    assert words == [word]
    assert editor.ghost == ""
    editor.press("<C-n><C-y>")
    editor.reads(f"{VALUES}\ntotal = {word}")


def test_popup_items_of_several_lines(neovim):
    editor = neovim(BODY, text="class Box:\n\n# end", options="popup = true", settings=PATIENT)
    editor.lua("vim.bo.autoindent = false vim.bo.indentexpr = ''")
    editor.lua("vim.o.completeopt = 'menuone,noselect'")
    editor.press("jidef area(self):<CR><C-x><C-o>")
    editor.until(lambda: editor.lua("return vim.fn.pumvisible()") == 1, "the popup menu")
    editor.press("<C-n><C-y>")
    editor.reads("class Box:\ndef area(self):\n    width = self.w\n    return width\n# end")


def test_popup_items_are_left_out_unless_asked_for(neovim):
    editor = neovim(SUM, text=VALUES)
    offered = editor.lua("return require('midfill.server').client().server_capabilities")
    assert "completionProvider" not in offered
    editor.press("ototal = ")
    editor.sees("sum(values)")


def test_two_buffers_share_a_server(neovim):
    editor = neovim(SUM, {"after": "answer = ", "text": "42"}, text=VALUES)
    editor.press("ototal = ")
    editor.sees("sum(values)")
    pid = editor.server_pid
    editor.press("<Esc>")
    editor.sees("")
    editor.api.command(f"split {editor.folder / 'other.py'}")
    editor.press("ianswer = ")
    editor.sees("42")
    assert editor.server_pid == pid
    editor.press("<Tab><Esc>")
    editor.reads("answer = 42")
    editor.api.command("wincmd p")
    editor.press("A")
    editor.sees("sum(values)")
    editor.press("<Tab>")
    editor.reads(VALUES + "\ntotal = sum(values)")


def test_a_server_that_dies_is_started_again(neovim):
    editor = neovim(SUM, text=VALUES)
    pid = editor.server_pid
    editor.press("ototal = ")
    editor.sees("sum(values)")
    os.kill(pid, signal.SIGKILL)
    editor.until(lambda: editor.server_pid not in {None, pid} and editor.state == "ready", "a new server")
    # Whoever waits with the cursor behind the text is served without a key.
    editor.sees("sum(values)")
    assert len(editor.notes) == 1
    assert "signal 9" in editor.notes[0]
    editor.press("<Tab>")
    editor.reads(VALUES + "\ntotal = sum(values)")


def test_a_server_that_dies_again_and_again_is_given_up(neovim, tmp_path):
    editor = neovim(text="", command=["/bin/sh", "-c", f"echo start >> {tmp_path}/starts; exit 3"])
    editor.until(lambda: editor.state == "given up", "the end of all trials")
    first, last = editor.notes
    assert "(status 3)" in first
    assert ":Midfill restart" in last
    assert (tmp_path / "starts").read_text().count("start") == 4


def test_a_server_that_is_not_there_is_said_once(neovim):
    editor = neovim(text="", command=["midfill-that-is-not-there", "serve"])
    editor.api.command(f"edit {editor.folder / 'other.py'}")
    assert editor.state == "missing"
    [note] = editor.notes
    assert "midfill-that-is-not-there" in note
    # What is named can be installed as it stands.
    assert f"pip install '{Path(__file__).parents[2]}'" in note


# Neovim looks for a Python of its own.
NO_PROVIDER = "vim.g.loaded_python3_provider = 0"


def test_nothing_of_the_folder_that_is_open_is_run(neovim, tmp_path, monkeypatch):
    hostile = Hostile(tmp_path, tmp_path.with_name(f"{tmp_path.name}-marks"))
    python = Path(sys.executable)
    found = {"PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]])}
    for name, value in hostile.environment(found).items():
        monkeypatch.setenv(name, value)
    _, _, *arguments = serve_command(tmp_path, (SUM,), tmp_path / "engine.log")
    editor = neovim(text=VALUES, command=[python.name, *arguments], before=NO_PROVIDER)
    editor.until(lambda: editor.state == "ready", "the server is ready")
    editor.press("ototal = ")
    editor.sees("sum(values)")
    editor.press("<Esc>")
    # The other programs that are started.
    editor.lua(SELECT + "end")
    editor.api.command("Midfill model")
    editor.until(lambda: editor.lua("return CHOICES ~= nil"), "the list of models")
    editor.api.command("checkhealth midfill")
    assert hostile.ran == []


@pytest.mark.parametrize("command", ["midfill", "./midfill", "bin/midfill"])
def test_a_server_that_is_in_the_folder_that_is_open_is_none(neovim, tmp_path, monkeypatch, command):
    hostile = Hostile(tmp_path, tmp_path.with_name(f"{tmp_path.name}-marks"))
    for name, value in hostile.environment({"PATH": "/usr/bin:/bin"}).items():
        monkeypatch.setenv(name, value)
    editor = neovim(text=VALUES, command=[command, "serve"], before=NO_PROVIDER)
    assert editor.state == "missing"
    editor.api.command("checkhealth midfill")
    assert "cannot run" in editor.text
    assert hostile.ran == []


def test_a_suggestion_is_dismissed(neovim):
    editor = neovim(SUM, text=VALUES, before="vim.g.python_recommended_style = 0")
    editor.press("ototal = ")
    editor.sees("sum(values)")
    editor.press("<C-]>")
    editor.sees("")
    editor.press("<Tab>")
    editor.reads(VALUES + "\ntotal = \t")


# Of a user's own, in insert mode.
WAYS = """
vim.o.keymodel, vim.o.selectmode = 'startsel', 'key'
for key, command in pairs {
  ['<F2>'] = 'stopinsert', ['<F3>'] = 'wincmd w', ['<F4>'] = 'set paste', ['<F5>'] = 'botright terminal',
  ['<F7>'] = 'tabnew', ['<F8>'] = 'lua vim.schedule(function() vim.cmd.stopinsert() end)', ['<F10>'] = 'new',
} do
  vim.keymap.set('i', key, '<Cmd>' .. command .. '<CR>')
end
"""
RESET = "silent! tabonly! | silent! only! | set nopaste | buffer! main.py | silent 2,$delete | new | wincmd p"


def test_every_way_out_of_insert_mode_takes_the_suggestion_away(neovim):
    editor = neovim(SUM, text=VALUES, before=WAYS)
    editor.api.command("new | wincmd p")
    keyed = [
        "<Esc>",
        "<C-[>",
        "<C-c>",
        "<C-o>",
        "<C-o>:",
        "<C-o>v",
        "<C-r>=",
        "<C-Bslash><C-n>",
        "<C-Bslash><C-o>",
    ]
    for way in [*keyed, "<Insert>", "<S-Left>", *(f"<F{number}>" for number in (2, 3, 4, 5, 7, 8, 10))]:
        editor.press("ototal = ")
        editor.sees("sum(values)")
        editor.press(way)
        drawn = "total = sum(values)"
        editor.until(lambda drawn=drawn: drawn not in editor.screen, f"the end of it by {way}")
        # Twice: out of a command line it leads back to insert mode.
        editor.press("<C-Bslash><C-n><C-Bslash><C-n>")
        editor.until(lambda: editor.lua("return vim.fn.mode(1)") in {"n", "nt"}, "normal mode")
        editor.api.command(RESET)
        editor.reads(VALUES)


@pytest.mark.parametrize(("out", "back"), [("<C-c>", "a"), ("<C-r>=", "<Esc>"), ("<Insert>", "<Insert>")])
def test_whoever_comes_back_to_insert_mode_sees_the_suggestion_again(neovim, out, back):
    editor = neovim(SUM, text=VALUES)
    editor.press("ototal = ")
    editor.sees("sum(values)")
    editor.press(out)
    editor.sees("")
    editor.press(back)
    editor.sees("sum(values)")
    editor.press("<Tab>")
    editor.reads(VALUES + "\ntotal = sum(values)")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("vim.keymap.set('i', '<Tab>', 'user')", "user"),
        ("vim.keymap.set('i', '<Tab>', function() return 'expr' end, {expr = true})", "expr"),
        ("vim.keymap.set('i', '<Tab>', function() vim.api.nvim_put({'call'}, 'c', false, true) end)", "call"),
        ("vim.keymap.set('i', '<Plug>(its)', 'plug') vim.keymap.set('i', '<Tab>', '<Plug>(its)')", "plug"),
        ("vim.o.expandtab = true vim.g.python_recommended_style = 0 vim.o.shiftwidth = 3", "   "),
    ],
)
def test_the_key_does_what_it_did_where_there_is_no_suggestion(neovim, before, after):
    editor = neovim(SUM, text="", before=before)
    editor.press("i<Tab>")
    editor.reads(after)
    editor.press("<CR>total = ")
    editor.sees("sum(values)")
    editor.press("<Tab>")
    editor.until(lambda: editor.text.endswith("total = sum(values)"), "the suggestion")


def test_keys_can_be_chosen_and_left_alone(neovim):
    editor = neovim(SUM, text=VALUES, options="keys = { accept = '<C-l>', accept_word = false }")
    assert editor.lua("return vim.fn.maparg('<C-Right>', 'i')") == ""
    editor.press("ototal = ")
    editor.sees("sum(values)")
    editor.press("<C-l>")
    editor.reads(VALUES + "\ntotal = sum(values)")


def test_nothing_comes_unasked_if_so_wanted_but_explicitly(neovim):
    editor = neovim(SUM, text=VALUES, options="auto = false")
    editor.press("ototal = ")
    editor.press("<M-Bslash>")
    editor.sees("sum(values)")
    assert num_requests(editor) == 1


def test_toggle_switches_ghost_text_and_popup_items(neovim):
    editor = neovim(SUM, text=VALUES)
    editor.api.command("Midfill toggle")
    assert editor.lua("return require('midfill').statusline()") == "midfill off"
    editor.press("ototal = ")
    place = editor.lua("return vim.lsp.util.make_position_params(0, 'utf-8')")
    assert editor.asks("textDocument/completion", place)["items"] == []
    assert editor.ghost == ""
    editor.api.command("Midfill toggle")
    editor.sees("sum(values)")


def test_commands(neovim):
    editor = neovim(SUM, text=VALUES)
    editor.press("ototal = ")
    editor.sees("sum(values)")
    editor.press("<Esc>")
    # Room for the messages: nothing waits for a key.
    editor.lua("vim.o.cmdheight = 20")
    assert editor.lua("return vim.fn.getcompletion('Midfill ', 'cmdline')") == [
        "adapter",
        "explain",
        "log",
        "model",
        "restart",
        "status",
        "toggle",
        "train",
    ]
    editor.api.command("Midfill explain")
    editor.until(lambda: "The last suggestion came from: model" in messages(editor), "the explanation")
    editor.api.command("Midfill status")
    editor.until(lambda: "last answer:" in messages(editor), "the status")
    # Neovim 0.10 does not keep what a server says of itself.
    keeps = editor.lua("return vim.fn.has('nvim-0.11') == 1")
    assert f"server: ready{', midfill 0' if keeps else ''}" in messages(editor)
    assert "this buffer: active" in messages(editor)
    editor.api.command("Midfill nonsense")
    assert 'unknown command "nonsense"' in editor.notes[-1]
    editor.api.command("Midfill log")
    assert editor.lua("return vim.api.nvim_buf_get_name(0)").endswith("lsp.log")


@pytest.mark.parametrize(("explanation", "said"), FUTURE)
def test_a_reason_that_is_not_known_here_is_told(neovim, explanation, said):
    editor = neovim(text=VALUES, command=[sys.executable, str(FUTURE_SERVER), json.dumps(explanation)])
    editor.lua("vim.o.cmdheight = 20")
    editor.api.command("Midfill explain")
    editor.until(lambda: said in messages(editor), "the explanation")


SELECT = "vim.ui.select = function(items, options, choose) CHOICES = vim.tbl_map(options.format_item, items) "


def test_a_model_is_chosen_among_those_that_are_here(neovim):
    editor = neovim(SUM, text=VALUES, before=SELECT + "choose(items[1]) end")
    pid = editor.server_pid
    editor.api.command("Midfill model")
    editor.until(lambda: editor.lua("return CHOICES"), "a choice")
    editor.until(lambda: editor.server_pid not in {None, pid} and editor.state == "ready", "a new server")
    chosen = editor.lua("return require('midfill.config').values.settings.model")
    assert editor.lua("return CHOICES[1]").split()[0] == chosen
    assert f"midfill model use {chosen}" in editor.notes[-1]


def test_an_adapter_that_is_not_here_is_named_and_none_can_be_chosen(neovim, tmp_path):
    (tmp_path / ".git").mkdir()
    editor = neovim(SUM, text=VALUES, before=SELECT + "choose(items[1]) end")
    editor.api.command("Midfill adapter")
    editor.until(lambda: editor.notes, "what became of it")
    assert editor.lua("return CHOICES") == ["no adapter"]
    assert "this workspace now uses no adapter" in editor.notes[-1]
    editor.api.command("Midfill adapter nobody")
    editor.until(lambda: "nobody" in editor.notes[-1], "what the server says")
    editor.api.command("Midfill status now")
    assert "too many arguments" in editor.notes[-1]


def test_an_adapter_is_learnt_if_the_user_agrees_and_progress_is_shown(neovim, model, tmp_path):
    (tmp_path / ".git").mkdir()
    progress = (
        "PROGRESS = {} vim.api.nvim_create_autocmd('LspProgress', { callback = function(event) "
        "local value = event.data.params.value table.insert(PROGRESS, { value.kind, value.title or '' }) "
        "end }) "
    )
    select = "vim.ui.select = function(items, options, choose) ASKED = options.prompt choose(items[1]) end"
    editor = neovim(SUM, text=VALUES, before=progress + select)
    editor.api.command("Midfill train")
    editor.until(lambda: editor.lua("return ASKED"), "the question")
    assert f"train an adapter for {model.name} on the git history of" in editor.lua("return ASKED")
    # That folder is no repository, which whoever reads its history finds.
    editor.until(lambda: any("is in no git repository" in note for note in editor.notes), "what came of it")
    told = editor.lua("return PROGRESS")
    assert ["begin", f"midfill: adapter {tmp_path.name}"] in told
    assert told[-1][0] == "end"


def test_no_settings_are_no_junk(neovim):
    editor = neovim(SUM, text=VALUES)
    assert editor.notes == []
    editor.lua(
        "require('midfill.config').values.settings = {} NOTES = {} vim.lsp.handlers['window/showMessage'] = "
        "function(_, said) table.insert(NOTES, said.message) end"
    )
    editor.api.command("Midfill restart")
    editor.press("ototal = ")
    editor.sees("sum(values)")
    assert editor.notes == []


def test_restart(neovim):
    editor = neovim(SUM, text=VALUES)
    pid = editor.server_pid
    editor.api.command("Midfill restart")
    editor.until(lambda: editor.server_pid not in {None, pid} and editor.state == "ready", "a new server")
    assert editor.notes == []
    editor.press("ototal = ")
    editor.sees("sum(values)")


def test_checkhealth(neovim):
    editor = neovim(SUM, text=VALUES)
    editor.api.command("checkhealth midfill")
    report = editor.text
    assert "the server is ready" in report
    assert "ERROR" not in report
    assert "<Tab>: accept" in report


def test_wrong_options_are_named(neovim):
    editor = neovim(SUM, text=VALUES)
    wrong = editor.lua("return {pcall(require('midfill').setup, {keys = {accpt = '<C-l>'}})}")
    assert wrong[0] is False
    assert "keys.accpt" in wrong[1]
    wrong = editor.lua("return {pcall(require('midfill').setup, {cmd = 'midfill'})}")
    assert "the option cmd must be a table" in wrong[1]


def test_the_help_has_tags_for_every_option(neovim):
    editor = neovim(SUM, text=VALUES)
    options = editor.lua(
        "local config = require('midfill.config').values local names = vim.tbl_keys(config) "
        "for name in pairs(config.keys) do table.insert(names, 'keys.' .. name) end return names"
    )
    docs = editor.folder / "doc"
    docs.mkdir()
    text = editor.lua("return vim.fn.readfile(vim.api.nvim_get_runtime_file('doc/midfill.txt', false)[1])")
    (docs / "midfill.txt").write_text("\n".join(text))
    editor.api.command(f"helptags {docs}")
    tags = {line.split("\t")[0] for line in (docs / "tags").read_text().splitlines()}
    assert {"midfill", ":Midfill", "midfill.setup()"} <= tags
    assert {f"midfill-{name}" for name in options} <= tags
    assert all(len(line) <= 78 for line in text)


@pytest.fixture
def native(neovim, nvim_program):
    """Start an editor that shows ghost text by itself, which Neovim does from 0.12 on."""
    version = subprocess.run([nvim_program, "--version"], capture_output=True, text=True, check=True).stdout
    if [int(part) for part in re.findall(r"\d+", version)[:2]] < [0, 12]:
        pytest.skip(f"{version.splitlines()[0]} has no vim.lsp.inline_completion; 0.12 has")
    return functools.partial(neovim, options="inline = 'native'")


def test_neovims_own_ghost_text(native):
    editor = native(SUM, text=VALUES, before="vim.g.python_recommended_style = 0")
    editor.press("o<Tab>")
    editor.reads(VALUES + "\n\t")
    editor.press("<BS>total = ")
    editor.sees("sum(values)")
    assert editor.screen[1] == "total = sum(values)"
    editor.press("<Tab>")
    editor.reads("values = [1, 2]\ntotal = sum(values)")
    assert editor.cursor == (2, 19)


def test_pieces_of_neovims_own_ghost_text(native):
    editor = native(BODY, text="")
    editor.lua("vim.bo.autoindent = false vim.bo.indentexpr = ''")
    editor.press("idef area(self):<CR>")
    editor.sees("    width = self.w\n    return width")
    editor.press("<C-Right>")
    editor.reads("def area(self):\n    width")
    editor.sees(" = self.w\n    return width")
    editor.press("<M-Right>")
    editor.reads("def area(self):\n    width = self.w")
    editor.until(lambda: "return width" in editor.ghost, "the rest")
    editor.press("<Tab>")
    editor.reads("def area(self):\n    width = self.w\n    return width")


def test_neovims_own_ghost_text_is_switched_off_and_on(native):
    editor = native(SUM, text=VALUES)
    editor.api.command("Midfill toggle")
    editor.press("ototal = ")
    editor.reads(VALUES + "\ntotal = ")
    # Neovim asks 200 ms after the last key; twice as long after it, it has not.
    editor.lua("vim.defer_fn(function() RESTED = true end, 400)")
    editor.until(lambda: editor.lua("return RESTED"), "a rest")
    assert num_requests(editor) == 0
    assert editor.ghost == ""
    editor.press("<Esc>cc")
    editor.api.command("Midfill toggle")
    editor.press("total = ")
    editor.sees("sum(values)")


def test_neovims_own_ghost_text_is_refused_where_there_is_none(neovim):
    editor = neovim(SUM, text=VALUES)
    refused = editor.lua("return {pcall(require('midfill').setup, {inline = 'native'})}")
    if editor.lua("return vim.lsp.inline_completion ~= nil"):
        assert refused[0] is True
    else:
        assert "needs Neovim 0.12" in refused[1]


@pytest.mark.real
@pytest.mark.slow
def test_the_default_model_suggests_something(neovim, model):
    text = "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return "
    editor = neovim(None, text=text, settings={"max_new_tokens": 32, "eagerness": "always"})
    editor.press("GA")
    editor.until(lambda: editor.ghost, "any ghost text")
    before = editor.text
    editor.press("<Tab>")
    editor.until(lambda: len(editor.text) > len(before), "the accepted text")
    assert editor.text.startswith(before)


def messages(editor):
    return editor.lua("return vim.api.nvim_exec2('messages', {output = true}).output")


def num_requests(editor):
    """How many answers the server has given."""
    return len(editor.asks("midfill/costs", {"after": 0})["answers"])
