"""The Emacs package in the real Emacs on a terminal, with the real server."""

import os
import signal

import pytest
from real_emacs import PACKAGE, batch

SUM = {"after": "total = ", "text": "sum(values)"}
BODY = {"after": "def area(self):\n", "text": "    width = self.w\n    return width"}
VALUES = "values = [1, 2]"


def type_total(editor):
    editor.press("End", "Enter")
    editor.type("total = ")
    editor.shows("sum(values)")


def test_ghost_text_of_several_lines_and_what_stands_behind_point(emacs):
    editor = emacs(BODY, {"after": "call(", "text": "a,\n  b"}, text="# first\n\n# end").ready()
    editor.press("Down")
    editor.type("def area(self):")
    editor.press("Enter")
    editor.sees("# first", "def area(self):", "    width = self.w", "    return width", "# end")
    assert editor.place == (2, 0)
    editor.press("Tab")
    editor.reads("# first\ndef area(self):\n    width = self.w\n    return width\n# end")
    editor.press("Enter")
    editor.type("call()")
    editor.press("Left", "C-c", "\\")
    editor.sees("call(a,", "  b)")
    editor.press("Tab")
    editor.until(lambda: "call(a,\n  b)" in editor.text, "the text inside the brackets")


def test_typing_through_a_suggestion_shortens_it_at_once_and_asks_nobody(emacs):
    # What each command leaves on the screen is noted before Emacs draws.
    note = (
        "(defvar seen nil) (add-hook 'post-command-hook"
        " (lambda () (push (if (overlay-buffer midfill--overlay)"
        ' (substring-no-properties (overlay-get midfill--overlay \'after-string)) "") seen)) 90)'
    )
    editor = emacs(SUM, text=VALUES).ready()
    type_total(editor)
    editor.until(lambda: editor.model_calls, "the end of the model's work")
    asked, calls = editor.asked, editor.model_calls
    editor.lisp(f"(progn {note} t)")
    editor.type("sum(val")
    editor.sees("total = sum(values)")
    editor.shows("ues)")
    rests = ["sum(values)"[index:] for index in range(1, 8)]
    assert editor.lisp("(vconcat (reverse seen))") == rests
    editor.press("BSpace")
    editor.shows("lues)")
    assert editor.asked == asked
    assert editor.model_calls == calls
    editor.press("Tab")
    editor.reads(VALUES + "\ntotal = sum(values)")


def test_brackets_and_quotes_that_emacs_closes_take_nothing_away(emacs):
    editor = emacs({"after": "é = f", "text": '("(", x)\n'}, text="x = 1").ready()
    editor.lisp("(progn (electric-pair-local-mode 1) t)")
    editor.press("End", "Enter")
    editor.type("é = f")
    editor.shows('("(", x)')
    editor.until(lambda: editor.model_calls, "the end of the model's work")
    asked = editor.asked
    editor.type('("')
    editor.until(lambda: editor.text == 'x = 1\né = f("")', "the closed bracket and quote")
    # Both quotes and the bracket of the suggestion are those of Emacs.
    editor.sees("x = 1", 'é = f("(", x)')
    assert editor.asked == asked
    editor.press("Tab")
    editor.reads('x = 1\né = f("(", x)')


def test_moving_on_takes_the_request_back(emacs):
    slow = {"after": "first = ", "text": "1" * 100, "token_delay_s": 0.3}
    editor = emacs(slow, {"after": "second = ", "text": "2"}, text="# here").ready()
    editor.press("End", "Enter")
    editor.type("first = ")
    # Only one that has been sent can be taken back.
    editor.until(lambda: editor.lisp("(if midfill--pending t :json-false)"), "a request")
    asked = editor.sent("textDocument/inlineCompletion")[-1]["id"]
    editor.press("Left")
    editor.until(
        lambda: asked in [message["params"]["id"] for message in editor.sent("$/cancelRequest")],
        "the request taken back",
    )
    editor.until(lambda: "cancelled" in editor.model_calls, "the end of the model's work")
    editor.press("End")
    editor.type("1")
    editor.press("Enter")
    editor.type("second = ")
    editor.sees("first = 1", "second = 2")


def test_every_way_out_of_writing_takes_the_suggestion_away(emacs):
    other = '(get-buffer-create "other")'
    editor = emacs(SUM, text=VALUES).ready()
    # Keys, or what happens by no key at all.
    ways = [
        "C-g",
        "C-s",
        "C-r",
        "M-x",
        "M-:",
        "C-x o",
        "C-x b",
        "C-x 2 C-x o",
        "C-Space Left",
        "C-x h",
        "C-x C-q",
    ]
    happenings = [
        f"(switch-to-buffer {other})",
        f"(pop-to-buffer {other})",
        f"(select-window (split-window)) (switch-to-buffer {other})",
        "(read-only-mode)",
        "(midfill-mode -1)",
        # As a completion that opens by itself, from a timer.
        '(setq company-candidates (list "summer")) (force-mode-line-update)',
        "(fundamental-mode)",
    ]
    for way in [*ways, *happenings]:
        editor.run("C-g")
        editor.run("C-g")
        editor.run("Escape", "Escape", "Escape")
        editor.lisp(
            '(progn (switch-to-buffer "main.py") (delete-other-windows) (split-window-below)'
            ' (set-window-buffer (next-window) "*scratch*") (read-only-mode -1) (python-mode) (midfill-mode)'
            f' (setq company-candidates nil) (erase-buffer) (insert "{VALUES}") t)'
        )
        type_total(editor)
        editor.sees(VALUES, "total = sum(values)")
        if way.startswith("("):
            editor.lisp(f"(progn (run-with-timer 0 nil (lambda () {way})) t)")
        else:
            editor.press(*way.split())
        editor.until(lambda: all("sum(" not in line for line in editor.screen), f"the end of it by {way}")


@pytest.mark.parametrize("mode", ["evil", "viper"])
def test_editing_with_modes(emacs, mode):
    before = {
        "evil": "(setq evil-want-C-i-jump nil) (require 'evil) (evil-mode)",
        "viper": "(setq viper-mode t viper-inhibit-startup-message t viper-expert-level 5) (require 'viper)",
    }
    editor = emacs(SUM, text=VALUES, before=before[mode]).ready()
    editor.escape()
    editor.type("ototal = ")
    editor.shows("sum(values)")
    editor.escape()
    editor.shows("")
    # Text is changed, but not written.
    asked = editor.asked
    editor.type("yyp")
    editor.until(lambda: editor.text.count("total") == 2, "the changed text")
    assert editor.asked == asked
    assert editor.ghost == ""
    editor.type("A")
    editor.press("BSpace")
    editor.type(" ")
    editor.shows("sum(values)")


def test_a_keyboard_macro_leaves_no_suggestion(emacs):
    editor = emacs(SUM, text=VALUES).ready()
    editor.press("C-x", "(")
    editor.press("End", "Enter")
    editor.type("total = ")
    editor.press("C-x", ")")
    editor.press("C-x", "e")
    editor.reads(VALUES + "\ntotal = \ntotal = ")
    editor.shows("")
    editor.press("BSpace")
    editor.type(" ")
    editor.shows("sum(values)")


def test_a_function_of_the_user_s_that_fails_leaves_no_suggestion(emacs):
    editor = emacs(SUM, text=VALUES).ready()
    type_total(editor)
    editor.lisp('(progn (setq midfill-inhibit-functions (list (lambda () (error "No!")))) t)')
    editor.press("Left")
    editor.shows("")
    editor.until(lambda: "midfill: No!" in editor.messages, "the message")
    editor.lisp("(progn (setq midfill-inhibit-functions nil) t)")
    editor.press("End", "BSpace")
    editor.type(" ")
    editor.shows("sum(values)")


def test_the_server_has_the_buffer_s_text_whatever_changes_it(emacs):
    editor = emacs(text="🙂 ab\ncd é\n\nlast").ready()
    theirs = (
        "(progn (midfill-server--flush) (plist-get (jsonrpc-request midfill-server--own :midfill/documentText"
        " (list :textDocument (list :uri midfill-server--uri))) :text))"
    )
    edits = [
        '(insert "x🙂é")',
        "(progn (goto-char 3) (delete-char 2))",
        "(upcase-region 1 (point-max))",
        "(progn (goto-char (point-min)) (forward-line) (transpose-lines 1))",
        "(subst-char-in-region 1 (point-max) ?L ?l)",
        '(progn (goto-char 1) (while (search-forward "a" nil t) (replace-match "bb🙂")))',
        '(save-restriction (narrow-to-region 2 5) (goto-char (point-max)) (insert "\\nin"))',
        "(progn (undo-boundary) (primitive-undo 1 buffer-undo-list))",
        '(let ((inhibit-modification-hooks t)) (goto-char 2) (insert "unseen"))',
        "(progn (goto-char 1) (kill-line) (goto-char (point-max)) (yank))",
        "(sort-lines nil (point-min) (point-max))",
        '(combine-change-calls 1 (point-max) (insert "1") (goto-char (point-max)) (insert "2"))',
        '(progn (delete-region 1 (point-max)) (insert "new\\n"))',
        "(revert-buffer t t)",
    ]
    for edit in edits:
        editor.lisp(f"(progn {edit} t)")
        assert editor.lisp(theirs) == editor.text, edit
    # Bytes that are no characters are one character each.
    editor.lisp('(progn (goto-char 1) (insert "a\\377b") (midfill-server--flush) t)')
    assert editor.lisp(theirs) == "a\ufffdb" + editor.lisp("(buffer-substring 4 (point-max))")


def test_popup_items(emacs):
    rule = {"after": "total = su", "text": "m(values)\n# more"}
    editor = emacs(rule, text=VALUES, before="(setq midfill-popup t midfill-auto nil)").ready()
    editor.press("End", "Enter")
    editor.type("total = su")
    editor.press("C-M-i")
    editor.reads(VALUES + "\ntotal = sum(values)\n# more")
    editor.until(lambda: editor.sent("workspace/executeCommand"), "the word that it was accepted")
    assert editor.asked == 0


def test_ghost_text_makes_room_for_an_open_popup(emacs):
    capf = '(list (- (point) 2) (point) \'("summer" "sun") :exclusive \'no)'
    offer = f"(setq completion-at-point-functions (list (lambda () {capf})))"
    before = f"(add-hook 'python-mode-hook (lambda () {offer}))"
    editor = emacs(SUM, text=VALUES, before=before).ready()
    type_total(editor)
    editor.type("su")
    editor.shows("m(values)")
    editor.press("C-M-i")
    editor.until(lambda: any("summer" in line for line in editor.screen), "the popup")
    editor.shows("")
    editor.press("BSpace", "BSpace")
    editor.until(lambda: "total = sum(values)" in editor.screen, "ghost text again")


def test_two_buffers_share_a_server(emacs):
    editor = emacs(SUM, {"after": "answer = ", "text": "42"}, text=VALUES).ready()
    other = editor.folder / "other.py"
    other.write_text("")
    type_total(editor)
    pid = editor.server_pid
    editor.press("C-x", "4", "f")
    editor.type("other.py")
    editor.press("Enter")
    # What was shown in the first window is gone with the cursor.
    editor.until(lambda: "total =" in editor.screen, "the first window without ghost text")
    editor.type("answer = ")
    editor.sees("answer = 42")
    editor.press("Tab")
    editor.reads("answer = 42")
    editor.press("C-x", "o")
    editor.until(lambda: editor.text.startswith(VALUES), "the first buffer")
    editor.press("BSpace")
    editor.type(" ")
    editor.sees("total = sum(values)")
    editor.press("Tab")
    editor.reads(VALUES + "\ntotal = sum(values)")
    assert editor.server_pid == pid
    opened = [message["params"]["textDocument"]["uri"] for message in editor.sent("textDocument/didOpen")]
    assert [uri for uri in opened if "scratch" not in uri] == [editor.file.as_uri(), other.as_uri()]
    editor.lisp('(with-current-buffer "other.py" (set-buffer-modified-p nil) (kill-buffer) t)')
    editor.until(lambda: editor.sent("textDocument/didClose"), "the end of the second document")


def test_keys_are_the_user_s_own_where_nothing_is_suggested(emacs):
    before = '(global-set-key (kbd "TAB") (lambda () (interactive) (insert "own")))'
    before += '(add-hook \'python-mode-hook (lambda () (local-unset-key (kbd "TAB"))))'
    editor = emacs(SUM, text=VALUES, before=before).ready()
    editor.press("End", "Enter", "Tab")
    editor.reads(VALUES + "\nown")
    editor.press("BSpace", "BSpace", "BSpace")
    editor.type("total = ")
    editor.shows("sum(values)")
    editor.press("C-g")
    editor.shows("")
    editor.press("Tab")
    editor.reads(VALUES + "\ntotal = own")
    editor.press("BSpace", "BSpace", "BSpace")
    editor.shows("sum(values)")
    editor.press("Tab")
    editor.reads(VALUES + "\ntotal = sum(values)")


def test_nothing_comes_unasked_if_so_wanted_but_explicitly(emacs):
    editor = emacs(SUM, text=VALUES, before="(setq midfill-auto nil)").ready()
    editor.press("End", "Enter")
    editor.type("total = ")
    editor.press("C-c", "\\")
    editor.shows("sum(values)")
    [request] = editor.sent("textDocument/inlineCompletion")
    assert request["params"]["context"]["triggerKind"] == 1


def test_commands_say_what_happens(emacs):
    editor = emacs(SUM, text=VALUES).ready()
    type_total(editor)
    editor.lisp("(progn (midfill-explain) t)")
    editor.until(lambda: "The last suggestion came from: model." in editor.messages, "the explanation")
    editor.lisp("(progn (midfill-status) t)")
    editor.until(lambda: "last answer: The last suggestion" in editor.messages, "the status")
    assert "server: ready, midfill 0" in editor.messages
    assert "this buffer: active" in editor.messages
    editor.lisp("(progn (midfill-toggle) t)")
    editor.shows("")
    editor.until(lambda: any("midfill:off" in line for line in editor.screen), "the mode line")
    editor.press("BSpace")
    editor.type(" ")
    editor.lisp("(progn (midfill-explain) t)")
    asked = editor.asked
    editor.lisp("(progn (midfill-toggle) t)")
    editor.press("BSpace")
    editor.type(" ")
    editor.shows("sum(values)")
    assert editor.asked > asked
    changes = editor.sent("workspace/didChangeConfiguration")
    assert [change["params"]["settings"]["midfill"]["enabled"] for change in changes] == [False, True]
    editor.lisp("(progn (midfill-log) t)")
    editor.until(lambda: "recording the session" in editor.text, "the log")


def connected(editor):
    """An editor whose client, Eglot or lsp-mode, has a server with a model."""
    served = "(if (midfill-server-connection) t :json-false)"
    editor.until(lambda: editor.lisp(served), "the connection")
    ask = (
        "(let ((state nil)) (midfill-server-request (midfill-server-connection) :midfill/status nil"
        " (lambda (status) (setq state (midfill-server-get status :state))))"
        " (while (not state) (accept-process-output nil 0.01)) state)"
    )
    editor.until(lambda: editor.lisp(ask) == "ready", "the model")
    return editor


EGLOT = (
    "(require 'eglot) (setq eglot-autoreconnect nil eglot-autoshutdown t)"
    "(push (cons 'python-mode midfill-command) eglot-server-programs)"
    "(setq-default eglot-workspace-configuration '((midfill . (:prefetch :json-false :max_new_tokens 200))))"
    "(add-hook 'python-mode-hook #'eglot-ensure)"
)


def test_eglot_s_own_server(emacs):
    slow = {"after": "slow = ", "text": "1" * 100, "token_delay_s": 0.3}
    editor = connected(emacs(SUM, slow, text=VALUES, client="eglot", before=EGLOT))
    editor.press("End", "Enter")
    editor.type('face = "🙂"; total = ')
    editor.sees(VALUES, 'face = "🙂"; total = sum(values)')
    editor.type("sum(val")
    editor.shows("ues)")
    editor.press("Tab")
    editor.reads(VALUES + '\nface = "🙂"; total = sum(values)')
    editor.until(lambda: editor.sent("workspace/executeCommand"), "the word that it was accepted")
    # Eglot does not take requests back, this package does.
    editor.press("Enter")
    editor.type("slow = ")
    editor.until(lambda: editor.lisp("(if midfill--pending t :json-false)"), "a request")
    editor.press("Left")
    editor.until(lambda: editor.sent("$/cancelRequest"), "the request taken back")
    editor.until(lambda: "cancelled" in editor.model_calls, "the end of the model's work")
    # Popup items are Eglot's own.
    editor.press("End", "BSpace", "Enter")
    editor.lisp("(progn (setq midfill-auto nil) t)")
    editor.type("total = ")
    editor.press("C-M-i")
    editor.until(lambda: editor.text.endswith("\ntotal = sum(values)"), "the popup item")
    # Its server dies.
    editor.lisp("(progn (setq midfill-auto t) t)")
    pid = editor.server_pid
    os.kill(pid, signal.SIGKILL)
    editor.until(lambda: editor.server_pid is None, "the end of the server")
    editor.press("M-x")
    editor.type("midfill-restart")
    editor.press("Enter")
    connected(editor)
    editor.press("Enter")
    editor.type("total = ")
    editor.shows("sum(values)")


def test_lsp_mode_s_server(emacs):
    before = (
        "(setq lsp-auto-guess-root t lsp-warn-no-matched-clients nil lsp-enable-file-watchers nil"
        " lsp-headerline-breadcrumb-enable nil lsp-enable-snippet nil lsp-session-file"
        ' (expand-file-name "session" default-directory))'
        "(require 'lsp-mode) (add-hook 'midfill-mode-hook #'lsp 90)"
    )
    slow = {"after": "slow = ", "text": "1" * 100, "token_delay_s": 0.3}
    editor = emacs(SUM, slow, text=VALUES, client="lsp-mode", before=before)
    connected(editor)
    editor.press("End", "Enter")
    # This lsp-mode counts characters, not UTF-16 units: behind an emoji its columns are wrong.
    editor.type('face = "é"; total = ')
    editor.sees(VALUES, 'face = "é"; total = sum(values)')
    editor.press("Tab")
    editor.reads(VALUES + '\nface = "é"; total = sum(values)')
    editor.until(lambda: editor.sent("workspace/executeCommand"), "the word that it was accepted")
    editor.press("Enter")
    editor.type("slow = ")
    editor.until(lambda: editor.lisp("(if midfill--pending t :json-false)"), "a request")
    editor.press("Left")
    editor.until(lambda: editor.sent("$/cancelRequest"), "the request taken back")


def test_the_package_compiles_and_is_well_documented(emacs_program):
    # Warnings are errors. What package-lint is told to pass over: it has no address, as it is published
    # nowhere, and this package-lint is older than Emacs 28.
    done = batch(
        """
        (require 'checkdoc)
        (require 'package-lint)
        (defvar all nil)
        (let ((byte-compile-error-on-warn t)
              (byte-compile-dest-file-function (lambda (_) (make-temp-file "midfill"))))
          (dolist (file '("midfill-server.el" "midfill.el"))
            (unless (byte-compile-file file) (push (list file 'compile) all))))
        (dolist (file '("midfill-server.el" "midfill.el"))
          (with-current-buffer (find-file-noselect file)
            (let ((package-lint-main-file "midfill.el"))
              (dolist (found (package-lint-buffer))
                (unless (string-match-p "Homepage or URL\\\\|uninstallable in all released" (nth 3 found))
                  (push (cons file found) all))))
            (let ((checkdoc-create-error-function
                   (lambda (text start _end &optional _fix) (push (list file text start) all) nil)))
              (checkdoc-current-buffer t))))
        (princ (format "FOUND %S" all))
        """,
        PACKAGE,
    )
    assert "FOUND nil" in done, done
