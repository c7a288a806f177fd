"""One identifier for a language, whatever an editor calls it."""

from collections import Counter

import pytest

from midfill.text import syntax
from midfill.text.documents import Document
from midfill.text.languages import _LANGUAGES, NOT_CODE, SUFFIXES, identify, is_among, language_id, normalise

# What editors send for the languages that midfill treats in a way of their own. From the sources that the
# module names; the comment says which editors.
SENT = {
    "c": "c c-ts C c.doxygen",  # all; Eglot; LSP4IJ; Vim
    "cpp": "cpp c++ c++-ts C++ C/C++ cpp.doxygen text/x-c++src",  # VS Code; Eglot; Zed; CLion; JupyterLab
    "csharp": "csharp cs c-sharp csharp-ts csharp-tree-sitter C#",  # VS Code; Vim; Helix; Eglot; Zed
    "commonlisp": "commonlisp lisp common-lisp",  # VS Code; Vim, Eglot; Helix
    "clojure": "clojure clojurec clojurescript clojure-ts",
    "css": "css css-ts CSS",
    "dart": "dart Dart dart-ts",
    "dockerfile": "dockerfile dockerfile-ts Dockerfile docker containerfile",
    "elisp": "elisp emacs-lisp lisp-interaction Emacs_Lisp",  # Helix, lsp-mode; Eglot
    "elixir": "elixir elixir-ts Elixir",
    "fsharp": "fsharp fsharp-ts F#",
    "go": "go go-ts golang Go",
    "go.mod": "go.mod gomod go-dot-mod go-mod-ts",
    "haskell": "haskell lhaskell haskell-ts haskell-literate text/x-haskell",
    "html": "html mhtml html-ts htmldjango HTML xhtml",
    "ini": "ini dosini conf-windows INI",
    "java": "java java-ts JAVA jdee",  # LSP4IJ writes it so
    "javascript": "javascript js js2 js3 js-ts rjsx JavaScript javascript.glimmer text/javascript",
    "javascriptreact": "javascriptreact jsx js-jsx javascript.jsx JSX_Harmony",
    "json": "json json-ts js-json JSON",
    "jsonc": "jsonc json-with-comments JSONC",
    "kotlin": "kotlin kotlin-ts Kotlin",
    "latex": "latex tex plaintex LaTeX plain-tex TeX context latex-mode",  # VS Code; Vim; AUCTeX
    "lua": "lua lua-ts Lua luau",
    "makefile": "makefile make Makefile makefile-gmake makefile-bsdmake automake make-ts",
    "markdown": "markdown gfm markdown-ts Markdown pandoc markdown.pandoc",
    "objective-c": "objective-c objc Objective-C obj-c",
    "objective-cpp": "objective-cpp objcpp objc++ Objective-C++",
    "perl": "perl cperl Perl",
    "perl6": "perl6 raku",
    "php": "php php-ts PHP phps php-only",
    "plaintext": "plaintext text txt fundamental Plain_Text TEXT prog text/plain unknown",
    "powershell": "powershell ps1 PowerShell pwsh",
    "python": "python py python-ts Python python3 ipython text/x-python text/x-ipython python.django",
    "r": "r R ess-r rscript",
    "restructuredtext": "restructuredtext rst reStructuredText",
    "ruby": "ruby ruby-ts enh-ruby Ruby ruby.rspec",
    "rust": "rust rust-ts rustic Rust",
    "scala": "scala scala-ts sbt Scala",
    "scss": "scss SCSS scss-ts",
    "shellscript": "shellscript sh bash bash-ts zsh ksh shell Shell_Script sh-mode sh.tmpl",
    "sql": "sql mysql plsql PostgreSQL GenericSQL",
    "swift": "swift swift-ts",
    "terraform": "terraform tf hcl",
    "toml": "toml toml-ts conf-toml TOML",
    "typescript": "typescript ts typescript-ts TypeScript typescript.jest",
    "typescriptreact": "typescriptreact tsx tsx-ts typescript.tsx typescript-tsx TypeScript_JSX",
    "vim": "vim viml vimrc VimL vim-script vimscript",
    "xml": "xml nxml XML svg",
    "yaml": "yaml yml yaml-ts yaml.ansible YAML docker-compose spring-boot-properties-yaml",
    "zig": "zig zig-ts Zig",
}
PAIRS = [
    (sent.replace("Shell_Script", "Shell Script"), ours)
    for ours, all_ in SENT.items()
    for sent in all_.split()
]


@pytest.mark.parametrize(("sent", "ours"), PAIRS)
def test_every_editors_name_of_a_language_is_one(sent, ours):
    assert normalise(sent) == ours
    # The file's name is asked only where the editor says nothing.
    assert identify(sent, "file:///w/a.lua") == (ours if ours != "plaintext" else "lua")


def test_every_grammar_belongs_to_a_row():
    ids = {row.id for row in _LANGUAGES}
    assert set(syntax._GRAMMARS) <= ids
    assert ids >= NOT_CODE


def test_a_name_belongs_to_one_row_only():
    names = [
        (name, row.id)
        for row in _LANGUAGES
        for name in {row.id, *f"{row.vim} {row.emacs} {row.helix} {row.others}".split()}
    ]
    assert [name for name, count in Counter(name for name, _ in names).items() if count > 1] == []
    for kind in ("suffixes", "files"):
        written = Counter(one for row in _LANGUAGES for one in getattr(row, kind).split())
        assert [one for one, count in written.items() if count > 1] == []


def test_a_name_is_written_as_it_is_looked_up():
    for row in _LANGUAGES:
        for name in (row.id, *f"{row.vim} {row.emacs} {row.helix} {row.others}".split()):
            assert normalise(name) == row.id
        assert all(one == one.lower() for one in f"{row.suffixes} {row.files}".split())
        assert all(one.startswith(".") for one in row.suffixes.split())


@pytest.mark.parametrize(
    ("sent", "uri", "ours"),
    [
        ("", "file:///w/a.py", "python"),
        ("plaintext", "file:///w/a.zig", "zig"),  # VS Code without an extension for it
        ("fundamental", "file:///w/a.rs", "rust"),  # Emacs likewise
        ("web", "file:///w/a.tsx", "typescriptreact"),
        ("web", "file:///w/a.html", "html"),
        ("ObjectiveC", "file:///w/a.cpp", "cpp"),  # CLion
        ("ObjectiveC", "file:///w/a.c", "c"),
        ("conf", "file:///w/a.toml", "toml"),
        ("conf", "file:///w/sshd_config", "conf"),
        ("textmate", "file:///w/a.lua", "lua"),
        ("some-new-language", "file:///w/a.go", "go"),
        ("some_new language", "file:///w/a.xyz", "some-new-language"),
        ("", "file:///w/x", "plaintext"),
        ("", "untitled:Untitled-1", "plaintext"),
        ("", "untitled:probe.rb", "ruby"),
        ("", "file:///c%3A/w/Makefile", "makefile"),
        ("", "file:///w/Dockerfile.dev", "dockerfile"),
        ("", "file:///w/a%20b.KT", "kotlin"),
        ("", "git:/w/a.php?ref=HEAD", "php"),
        ("", "vscode-notebook-cell:/w/a.ipynb#W0sZmlsZQ", "plaintext"),
        ("", "C:\\w\\a.cs", "csharp"),
        ("", "file:///w/CMakeLists.txt", "cmake"),
        ("", "file:///w/.bashrc", "shellscript"),
        ("", "file:///w/%E9.swift", "swift"),
        ("", "", "plaintext"),
        # What an editor knows better than the name tells.
        ("cpp", "file:///w/a.h", "cpp"),
        ("javascriptreact", "file:///w/a.js", "javascriptreact"),
        ("objc", "file:///w/a.h", "objective-c"),
        ("blade", "file:///w/a.blade.php", "blade"),
        ("prolog", "file:///w/a.pl", "prolog"),
    ],
)
def test_where_the_editor_says_nothing_the_file_does(sent, uri, ours):
    assert identify(sent, uri) == ours


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("#!/bin/sh\n", "shellscript"),
        ("#! /usr/bin/env bash", "shellscript"),
        ("#!/usr/bin/env -S python3 -u\n", "python"),
        ("#!/usr/bin/python3.11\n", "python"),
        ("#!/usr/bin/env FOO=1 node\n", "javascript"),
        ("#!/usr/bin/env -S deno run\n", "javascript"),
        ("#!/usr/bin/perl -w\n", "perl"),
        ("#!/usr/bin/env Rscript\n", "r"),
        ("#!/usr/bin/make -f\n", "makefile"),
        ("#!/nowhere/unheard-of\n", "plaintext"),
        ("#!\n", "plaintext"),
        ("# sh\n", "plaintext"),
    ],
)
def test_what_runs_a_file_tells_its_language(line, ours):
    assert identify("", "file:///w/tool", line) == ours
    assert Document.open("file:///w/tool", "", 1, line).language_id == ours
    # Behind an editor's word and a file's name.
    assert identify("ruby", "file:///w/tool", line) == "ruby"
    assert identify("", "file:///w/tool.go", line) == "go"


def test_a_document_has_our_name_and_the_editors():
    document = Document.open("file:///w/a", "sh", 1, "echo\n")
    assert (document.language_id, document.sent_language) == ("shellscript", "sh")


def test_names_in_settings_are_any_editors():
    assert is_among(["sh"], "shellscript", "shellscript")
    assert is_among(["Shell Script"], "shellscript", "bash")
    assert is_among(["tex"], "latex", "plaintex")
    assert is_among(["emacs-lisp", "yml"], "yaml", "yaml")
    assert not is_among(["javascript"], "typescript", "typescript")
    assert not is_among(["conf"], "plaintext", "text")
    # A toggle of an editor writes what the editor sends, though the file's name told us more.
    assert is_among(["plaintext"], "zig", "plaintext")
    assert not is_among([], "python", "python")


def test_files_with_code_are_watched_and_others_are_not():
    assert {".py", ".tsx", ".ex", ".zig", ".sh"} <= set(SUFFIXES)
    assert not {".md", ".json", ".yaml", ".html", ".txt", ".tex"} & set(SUFFIXES)
    assert language_id("a/b/App.TSX") == "typescriptreact"
    assert language_id("notes") == "plaintext"
