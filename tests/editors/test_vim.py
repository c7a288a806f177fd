"""The Vim plugin in the real Vim on a terminal, with the real server."""

import pytest
from real_vim import PLUGIN

SUM = {"after": "total = ", "text": "sum(values)"}
BODY = {"after": "def area(self):\n", "text": "    width = self.w\n    return width"}
VALUES = "values = [1, 2]"


def type_total(editor):
    editor.type("ototal = ")
    editor.shows("sum(values)")


def test_ghost_text_of_several_lines(vim):
    editor = vim(BODY, {"after": "call(", "text": "a,\n  b"}, text="# first\n\n# end").ready()
    editor.type("jidef area(self):")
    editor.press("Enter")
    editor.sees("# first", "def area(self):", "    width = self.w", "    return width", "# end")
    assert editor.place == (2, 0)
    editor.press("Tab")
    editor.reads("# first\ndef area(self):\n    width = self.w\n    return width\n# end")
    # Inside brackets: the lines below come after what stands behind the cursor, which Vim cannot hide.
    editor.press("Enter")
    editor.type("call()")
    editor.press("Left", "C-g", "m")
    editor.sees("call(a,)", "  b")
    editor.press("Tab")
    editor.until(lambda: "call(a,\n  b)\n# end" in editor.text, "the text inside the brackets")


def test_tabs_are_as_wide_as_they_will_be(vim):
    rule = {"after": "if b:\n", "text": "\tc =\t1\n\td =\t2"}
    editor = vim(rule, text="if a:\n\tb = 1\n", name="main.txt").ready()
    editor.type("Goif b:")
    editor.press("Enter")
    editor.sees("if b:", "        c =     1", "        d =     2")
    editor.press("Tab")
    editor.reads("if a:\n\tb = 1\nif b:\n\tc =\t1\n\td =\t2")
    editor.sees("if b:", "        c =     1", "        d =     2")


def test_typing_through_a_suggestion_shortens_it_at_once_and_asks_nobody(vim):
    editor = vim(SUM, text=VALUES).ready()
    type_total(editor)
    editor.until(lambda: editor.model_calls, "the end of the model's work")
    asked, calls = editor.asked, editor.model_calls
    # Drawn in the turn of the key itself, in which no answer of the server can be read.
    editor.eval(
        "execute(['def g:Note()', 'redraw',"
        " 'const line = range(1, 30)->mapnew((_, c) => screenstring(2, c))',"
        " 'g:seen = get(g:, \"seen\", []) + [trim(join(line, \"\"))]', 'enddef',"
        " 'autocmd TextChangedI * g:Note()'])"
    )
    for index, key in enumerate("sum(val", 1):
        editor.type(key)
        editor.shows("sum(values)"[index:])
    assert editor.eval("g:seen") == ["total = sum(values)"] * 7
    editor.press("BSpace")
    editor.shows("lues)")
    assert editor.asked == asked
    assert editor.model_calls == calls
    editor.press("Tab")
    editor.reads(VALUES + "\ntotal = sum(values)")


# As plugins such as delimitMate do.
AUTOPAIRS = "execute(['inoremap ( ()<C-g>U<Left>', 'inoremap \" \"\"<C-g>U<Left>'])"


def test_brackets_and_quotes_that_vim_closes_take_nothing_away(vim):
    editor = vim({"after": "é = f", "text": '("(", x)\n'}, text="x = 1").ready()
    editor.eval(AUTOPAIRS)
    editor.type("oé = f")
    editor.shows('("(", x)')
    editor.until(lambda: editor.model_calls, "the end of the model's work")
    asked = editor.asked
    editor.type('("')
    editor.until(lambda: editor.text == 'x = 1\né = f("")', "the closed bracket and quote")
    # Both quotes and the bracket of the suggestion are those of Vim.
    editor.shows('(", x)')
    editor.sees("x = 1", 'é = f("(", x)')
    assert editor.asked == asked
    editor.press("Tab")
    editor.reads('x = 1\né = f("(", x)')


def test_moving_on_takes_the_request_back(vim):
    slow = {"after": "first = ", "text": "1" * 100, "token_delay_s": 0.3}
    editor = vim(slow, {"after": "second = ", "text": "2"}, text="# here").ready()
    editor.type("ofirst = ")
    editor.until(lambda: editor.eval("midfill#Statusline()") == "midfill …", "a request")
    editor.until(lambda: editor.asked, "the server's having read it")
    asked = editor.sent("textDocument/inlineCompletion")[-1]["id"]
    editor.escape()
    editor.until(
        lambda: asked in [message["params"]["id"] for message in editor.sent("$/cancelRequest")],
        "the request taken back",
    )
    editor.until(lambda: "cancelled" in editor.model_calls, "the end of the model's work")
    editor.type("A1")
    editor.press("Enter")
    editor.type("second = ")
    editor.sees("first = 1", "second = 2")


# What the user has mapped in insert mode, for ways out that have no key, and the way back.
WAYS = r"""
set keymodel=startsel selectmode=key pastetoggle=<F6>
def g:Reset()
  set nopaste
  silent! tabonly!
  silent! only!
  execute 'buffer!' bufnr('main.py')
  silent :2,$delete
  new
  wincmd p
  g:Pause(false)
enddef
def g:Pause(paused: bool)
  for timer in timer_info()
    timer_pause(timer.id, paused)
  endfor
enddef
inoremap <F2> <Cmd>stopinsert<CR>
inoremap <F3> <Cmd>wincmd w<CR>
inoremap <F4> <Cmd>set paste<CR>
inoremap <F5> <Cmd>botright terminal<CR>
inoremap <F7> <Cmd>tabnew<CR>
inoremap <F8> <Cmd>call feedkeys("\<C-c>", "nt")<CR>
inoremap <F9> <Cmd>call feedkeys("\<C-\>\<C-n>", "nt")<CR>
inoremap <F10> <Cmd>new<CR>
"""


def test_every_way_out_of_insert_mode_takes_the_suggestion_away(vim):
    editor = vim(SUM, text=VALUES, before=WAYS).ready()
    keyed = [
        "Escape",
        "C-[",
        "C-c",
        "C-c C-c",
        "C-o",
        "C-o :",
        "C-o v",
        "C-r =",
        "C-\\ C-n",
        "C-\\ C-o",
        "IC",
    ]
    for way in [*keyed, "S-Left", *(f"F{number}" for number in range(2, 11))]:
        # Twice: out of a command line it leads back to insert mode.
        editor.press("C-\\", "C-n", "C-\\", "C-n")
        editor.type(":call g:Reset()")
        editor.press("Enter")
        editor.reads(VALUES)
        type_total(editor)
        editor.sees(VALUES, "total = sum(values)")
        # What comes by itself must do: the timer by which tests look into Vim would have it draw.
        editor.eval("execute('call g:Pause(true)')")
        editor.press(*way.split())
        editor.until(lambda: all("sum(" not in line for line in editor.screen), f"the end of it by {way}")


def test_ctrl_c_takes_the_request_back(vim):
    slow = {"after": "first = ", "text": "1" * 100, "token_delay_s": 0.3}
    editor = vim(slow, text="# here").ready()
    editor.type("ofirst = ")
    editor.until(lambda: editor.asked, "the server's having read it")
    editor.press("C-c")
    editor.until(lambda: editor.sent("$/cancelRequest"), "the request taken back")
    editor.until(lambda: "cancelled" in editor.model_calls, "the end of the model's work")
    assert editor.ghost == ""


@pytest.mark.parametrize(
    ("out", "back"),
    [(["C-c"], ["a"]), (["C-r", "="], ["Escape"]), (["C-o", ":"], ["Escape"]), (["IC"], ["IC"])],
    ids=["a", "expression", "command line", "Replace"],
)
def test_whoever_comes_back_to_insert_mode_sees_the_suggestion_again(vim, out, back):
    editor = vim(SUM, text=VALUES).ready()
    type_total(editor)
    editor.press(*out)
    editor.shows("")
    editor.press(*back)
    editor.sees(VALUES, "total = sum(values)")
    editor.press("Tab")
    editor.reads(VALUES + "\ntotal = sum(values)")


@pytest.mark.parametrize("end", [r"\<Esc>", r"\<C-c>", r"\<C-\>\<C-n>"])
def test_a_macro_leaves_no_suggestion(vim, end):
    editor = vim(SUM, text=VALUES).ready()
    editor.run(f'call setreg("q", "ototal = {end}")')
    type_total(editor)
    editor.escape()
    editor.type("@q")
    editor.reads(VALUES + "\ntotal = \ntotal = ")
    editor.until(lambda: editor.eval("mode() .. reg_executing()") == "n", "the end of the macro")
    assert editor.ghost == ""
    assert all("sum(" not in line for line in editor.screen)
    # What is typed after it is asked for as ever.
    editor.type("A")
    editor.press("BSpace")
    editor.type(" ")
    editor.shows("sum(values)")


def test_the_server_has_the_buffer_s_text_whatever_changes_it(vim):
    editor = vim(text="🙂 ab\ncd é\n\nlast\n").ready()

    def theirs():
        assert editor.eval("execute('call midfill#server#Flush(1)')") == ""
        asked = "{textDocument: midfill#documents#Identifier(1)}"
        return editor.eval(f"midfill#server#Ask('midfill/documentText', {asked}, 5000).text")

    edits = [
        "normal! ggAx🙂é",
        "normal! ggxx",
        "%s/./\\0é/e",
        "2,3join",
        "normal! yyppp",
        "1move $",
        "normal! ggddGp",
        "undo 1",
        "redo",
        "%s/$/\\r🙂/",
        "global/🙂/delete",
        "call append(0, ['a', '', 'b'])",
        "call setline(2, ['x', 'y🙂z', 'w'])",
        "sort",
        "normal! ggVGd",
        "read !printf 'one\\ntwo\\n'",
        "normal! ggO",
        "1,2delete",
        "call setline(1, repeat(['a line that is long enough'], 2000))",
        "%s/long/🙂/",
        "edit!",
    ]
    for edit in edits:
        editor.run(edit)
        assert theirs() == editor.text + "\n", edit
    assert editor.text == "🙂 ab\ncd é\n\nlast"


def test_popup_items(vim):
    rule = {"after": "total = su", "text": "m(values)\n# more"}
    editor = vim(rule, text=VALUES, before="g:midfill_auto = false").ready()
    editor.run("set omnifunc=midfill#Complete")
    editor.type("ototal = su")
    editor.press("C-x", "C-o")
    editor.reads(VALUES + "\ntotal = sum(values)")
    editor.press("C-y")
    editor.reads(VALUES + "\ntotal = sum(values)\n# more")
    editor.until(lambda: editor.sent("workspace/executeCommand"), "the word that it was accepted")
    assert editor.asked == 0


def test_ghost_text_makes_room_for_an_open_popup(vim):
    editor = vim(SUM, text=VALUES, before="set completeopt=menuone,noselect").ready()
    editor.run("call append(0, ['summer sun'])")
    type_total(editor)
    editor.type("su")
    editor.shows("m(values)")
    editor.press("C-n")
    editor.until(
        lambda: any("summer" in line and "total" not in line for line in editor.screen[3:]), "the popup"
    )
    editor.shows("")
    editor.press("C-e")
    editor.sees("total = sum(values)")


def test_two_buffers_share_a_server(vim):
    editor = vim(SUM, {"after": "answer = ", "text": "42"}, text=VALUES).ready()
    other = editor.folder / "other.py"
    other.write_text("")
    type_total(editor)
    pid = editor.server_pid
    editor.escape()
    editor.sees("total =")
    editor.type(":split other.py")
    editor.press("Enter")
    editor.type("ianswer = ")
    editor.sees("answer = 42")
    editor.press("Tab")
    editor.reads("answer = 42")
    editor.escape()
    editor.press("C-w", "w")
    editor.type("A")
    editor.sees("total = sum(values)")
    editor.press("Tab")
    editor.reads(VALUES + "\ntotal = sum(values)")
    assert editor.server_pid == pid
    opened = [message["params"]["textDocument"]["uri"] for message in editor.sent("textDocument/didOpen")]
    assert opened == [editor.file.as_uri(), other.as_uri()]
    editor.run("bwipeout! other.py")
    editor.until(lambda: editor.sent("textDocument/didClose"), "the end of the second document")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("inoremap <Tab> user", "user"),
        ("inoremap <expr> <Tab> 'expr'", "expr"),
        ("inoremap <Plug>(its) plug\nimap <Tab> <Plug>(its)", "plug"),
        ("set expandtab shiftwidth=3 softtabstop=3", "   "),
    ],
)
def test_the_key_does_what_it_did_where_there_is_no_suggestion(vim, before, after):
    editor = vim(SUM, text="", before=before).ready()
    editor.type("i")
    editor.press("Tab")
    editor.reads(after)
    editor.press("Enter")
    editor.type("total = ")
    editor.shows("sum(values)")
    editor.press("C-]")
    editor.shows("")
    editor.press("Tab")
    editor.until(lambda: len(editor.text) > len(after + "\ntotal = "), "what the key did")
    editor.press("Enter")
    editor.type("total = ")
    editor.shows("sum(values)")
    editor.press("Tab")
    editor.until(lambda: editor.text.endswith("total = sum(values)"), "the suggestion")


def test_keys_can_be_chosen_and_left_alone(vim):
    before = "g:midfill_keys = {accept: '<C-l>', accept_word: ''}\ng:midfill_auto = false"
    editor = vim(SUM, text=VALUES, before=before).ready()
    assert editor.eval("maparg('<C-Right>', 'i')") == ""
    editor.type("ototal = ")
    editor.press("C-g", "m")
    editor.shows("sum(values)")
    [request] = editor.sent("textDocument/inlineCompletion")
    assert request["params"]["context"]["triggerKind"] == 1
    editor.press("C-l")
    editor.reads(VALUES + "\ntotal = sum(values)")


def test_wrong_options_are_named(vim):
    editor = vim(text=VALUES, before="g:midfill_keys = {accpt: '<C-l>'}")
    editor.until(lambda: any("accpt" in line for line in editor.screen), "the name of the wrong option")
    assert any("accept_word" in line for line in editor.screen)


def test_commands_say_what_happens(vim):
    editor = vim(SUM, text=VALUES).ready()
    assert editor.eval("getcompletion('Midfill ', 'cmdline')") == [
        *("explain", "log", "restart", "status", "toggle"),
    ]
    type_total(editor)
    editor.escape()
    editor.run("set cmdheight=12")
    editor.run("Midfill explain")
    editor.until(lambda: "The last suggestion came from: model." in editor.messages, "the explanation")
    editor.run("Midfill status")
    editor.until(lambda: "last answer: The last suggestion" in editor.messages, "the status")
    assert "server: ready, midfill 0" in editor.messages
    assert "this buffer: active" in editor.messages
    assert 'unknown command "nonsense"' in editor.run("Midfill nonsense")
    editor.run("Midfill toggle")
    assert editor.eval("midfill#Statusline()") == "midfill off"
    asked = editor.asked
    editor.type("A")
    editor.press("BSpace")
    editor.type(" ")
    editor.reads(VALUES + "\ntotal = ")
    assert editor.asked == asked
    editor.run("Midfill toggle")
    editor.shows("sum(values)")
    changes = editor.sent("workspace/didChangeConfiguration")
    assert [change["params"]["settings"]["midfill"]["enabled"] for change in changes] == [False, True]
    editor.escape()
    editor.run("Midfill log")
    editor.until(lambda: "recording the session" in editor.text, "the log")


def test_the_help_has_tags_for_every_option(vim):
    editor = vim(text=VALUES)
    help_file = editor.folder / "doc" / "midfill.txt"
    help_file.parent.mkdir()
    text = (PLUGIN / "doc" / "midfill.txt").read_text(encoding="utf-8")
    help_file.write_text(text, encoding="utf-8")
    editor.run(f"helptags {help_file.parent}")
    tags = {line.split("\t")[0] for line in (help_file.parent / "tags").read_text().splitlines()}
    options = editor.eval("midfill#config#Names()")
    assert {"g:midfill_command", "g:midfill_keys"} <= {f"g:midfill_{name}" for name in options} <= tags
    assert {"midfill", ":Midfill"} <= tags
    assert all(len(line) <= 78 for line in text.splitlines())
