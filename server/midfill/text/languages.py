"""Languages: one identifier for each, whatever an editor calls it, or by the file if the editor does not say.

Editors name one language in many ways: VS Code `shellscript`, Vim and Neovim their file type `sh`, Eglot the
rest of a mode's name (`sh`, `bash`, `js`, `c++`), Helix `bash`, JetBrains `Shell Script`. Inside midfill
there is one name: VS Code's, as in the LSP specification's list, or the language's own name. The table is the
only place that knows the others. Pure; any thread.

Sources, read in November 2026: VS Code's "Known language identifiers" and the LSP specification's table of
`TextDocumentItem`; `filetype.vim` of Vim 9.0 and `filetype.lua` of Neovim 0.7; Eglot, which sends the mode's
name without `-mode` or `-ts-mode`; `lsp-language-id-configuration` of lsp-mode 8.0; Helix's `languages.toml`
(name, or its `language-id`); `LANGUAGE_IDENTIFIERS` of Sublime's LSP, else the second word of the scope;
LSP4IJ, which sends a mapping's id or IntelliJ's `Language.getID()`; Zed, which sends a language's name in
lower case; Kate, which sends the key of the server's entry in its settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePath
from urllib.parse import unquote

PLAIN = "plaintext"


@dataclass(frozen=True, slots=True)
class _Language:
    """A row of the table. Several names are separated by spaces, in the form that `normalise` looks up.

    Attributes:
        id: midfill's own name: VS Code's if it has one.
        vim: file types of Vim and Neovim (and of their clients ALE and coc.nvim).
        emacs: names of modes without `-mode`, as Eglot sends them, and what lsp-mode sends.
        helix: names in its `languages.toml`.
        others: names of Sublime Text, JetBrains, Zed and JupyterLab; and names that people write.
        suffixes: of file names. A suffix that several languages share is in no row.
        files: whole names of files, in lower case.
    """

    id: str
    vim: str = ""
    emacs: str = ""
    helix: str = ""
    others: str = ""
    suffixes: str = ""
    files: str = ""


_LANGUAGES = (
    _Language("ada", emacs="ada", suffixes=".adb .ads"),
    _Language("astro", suffixes=".astro"),
    _Language("awk", others="gawk mawk", suffixes=".awk"),
    _Language("bat", vim="dosbatch", emacs="bat", helix="batch", others="cmd", suffixes=".bat .cmd"),
    _Language("bibtex", vim="bib", emacs="bibtex", suffixes=".bib"),
    _Language("blade"),
    _Language("c", emacs="c", others="csrc", suffixes=".c .h"),
    _Language("clojure", emacs="clojurec clojurescript", suffixes=".clj .cljs .cljc .edn"),
    _Language("cmake", suffixes=".cmake", files="cmakelists.txt"),
    _Language("coffeescript", vim="coffee", suffixes=".coffee"),
    _Language("commonlisp", vim="lisp", emacs="lisp", helix="common-lisp", suffixes=".lisp .asd"),
    _Language(
        "cpp",
        emacs="c++",
        others="c++src cplusplus",
        suffixes=".cc .cpp .cxx .c++ .hh .hpp .hxx .h++ .ipp .tpp .ixx .cppm",
    ),
    _Language("crystal", suffixes=".cr"),
    _Language(
        "csharp",
        vim="cs",
        emacs="csharp csharp-tree-sitter",
        helix="c-sharp",
        others="c#",
        suffixes=".cs .csx",
    ),
    _Language("css", suffixes=".css"),
    _Language("csv", vim="csv tsv", others="tsv", suffixes=".csv .tsv"),
    _Language("cuda-cpp", vim="cuda", emacs="cuda", others="cuda-c++", suffixes=".cu .cuh"),
    _Language("cython", vim="pyrex", suffixes=".pyx .pxd"),
    _Language("d"),
    _Language("dart", suffixes=".dart"),
    _Language("diff", others="patch", suffixes=".diff .patch"),
    _Language("dockerfile", others="docker containerfile", files="dockerfile containerfile"),
    _Language("dtrace"),
    _Language(
        "elisp", emacs="emacs-lisp lisp-interaction", others="emacslisp", suffixes=".el", files=".emacs"
    ),
    _Language("elixir", emacs="elixir", others="iex", suffixes=".ex .exs"),
    _Language("elm", suffixes=".elm"),
    _Language("erb", vim="eruby", helix="rshtml", others="rhtml html-erb", suffixes=".erb"),
    _Language("erlang", suffixes=".erl .hrl"),
    _Language("fish", suffixes=".fish"),
    _Language("forth"),
    _Language(
        "fortran",
        emacs="f90",
        others="modern-fortran fixedform-fortran",
        suffixes=".f90 .f95 .f03 .f08 .f .for",
    ),
    _Language("fsharp", others="f#", suffixes=".fsi .fsx"),
    _Language("gdscript", vim="gdscript gdscript3", suffixes=".gd"),
    _Language("git-commit", vim="gitcommit", emacs="git-commit", files="commit_editmsg"),
    _Language("git-rebase", vim="gitrebase", emacs="git-rebase", files="git-rebase-todo"),
    _Language("gleam", suffixes=".gleam"),
    _Language("glsl", suffixes=".glsl .vert .frag"),
    _Language("go", others="golang", suffixes=".go"),
    _Language("go.mod", vim="gomod", emacs="go-dot-mod go-mod", helix="gomod", files="go.mod"),
    _Language("graphql", suffixes=".graphql .gql"),
    _Language("groovy", suffixes=".groovy .gradle", files="jenkinsfile"),
    _Language("hack", suffixes=".hack"),
    _Language("handlebars", vim="html.handlebars", others="hbs", suffixes=".hbs .handlebars"),
    _Language(
        "haskell", vim="lhaskell", emacs="haskell-literate", helix="haskell-literate", suffixes=".hs .lhs"
    ),
    _Language(
        "html",
        vim="htmldjango xhtml htmlangular",
        emacs="mhtml sgml html+ xhtml",
        helix="htmldjango",
        others="django-html jinja-html django",
        suffixes=".html .htm .xhtml",
    ),
    _Language(
        "ini",
        vim="dosini confini gitconfig editorconfig systemd desktop",
        emacs="conf-windows conf-desktop gitconfig editorconfig-conf",
        helix="git-config",
        suffixes=".ini",
        files=".editorconfig .gitconfig setup.cfg",
    ),
    _Language("java", emacs="java jdee", suffixes=".java"),
    _Language(
        "javascript",
        emacs="js js2 js3 rjsx",
        others="javascript-es6 ecmascript ecmascript-6 flow-js node nodejs deno bun",
        suffixes=".js .mjs .cjs",
    ),
    _Language(
        "javascriptreact",
        vim="javascript.jsx",
        emacs="js-jsx jsx",
        helix="jsx",
        others="jsx-harmony javascript-react",
        suffixes=".jsx",
    ),
    _Language("json", emacs="js-json", others="jsonlines ndjson", suffixes=".json .jsonl .ndjson"),
    _Language("json5", suffixes=".json5"),
    _Language("jsonc", others="json-with-comments", suffixes=".jsonc"),
    _Language("julia", emacs="ess-julia", suffixes=".jl"),
    _Language("just", suffixes=".just", files="justfile"),
    _Language("kotlin", others="kotlinscript", suffixes=".kt .kts"),
    _Language(
        "latex",
        vim="tex plaintex context",
        emacs="latex tex plain-tex plaintex context doctex latex-tex",
        others="latex-expl3",
        suffixes=".tex .sty .ltx",
    ),
    _Language("less", emacs="less-css", suffixes=".less"),
    _Language("lua", others="luajit luau", suffixes=".lua .luau"),
    _Language(
        "makefile",
        vim="make automake",
        emacs="makefile-gmake makefile-bsdmake makefile-automake makefile-imake makefile-makepp",
        helix="make",
        others="gnumakefile",
        suffixes=".mk .mak",
        files="makefile gnumakefile makefile.am makefile.in",
    ),
    _Language(
        "markdown",
        vim="markdown pandoc mkd ghmarkdown vimwiki",
        emacs="gfm markdown-view gfm-view",
        helix="markdown-rustdoc",
        others="ipythongfm",
        suffixes=".md .markdown .mdown",
    ),
    _Language("matlab", emacs="octave", vim="octave"),
    _Language("mdx", suffixes=".mdx"),
    _Language("nim", suffixes=".nim .nims"),
    _Language("nix", suffixes=".nix"),
    _Language("objective-c", vim="objc", emacs="objc", others="obj-c"),
    _Language(
        "objective-cpp", vim="objcpp", emacs="objc++", others="objc++ objective-c++ obj-c++", suffixes=".mm"
    ),
    _Language(
        "ocaml", emacs="tuareg caml", helix="ocaml-interface", others="ocaml.interface", suffixes=".ml .mli"
    ),
    _Language("pascal", emacs="opascal", others="delphi objectpascal", suffixes=".pas .dpr"),
    _Language("perl", emacs="cperl", suffixes=".pl .pm"),
    _Language("perl6", vim="raku", others="rakudo", suffixes=".raku .rakumod"),
    _Language("php", emacs="php phps", helix="php-only", suffixes=".php .phtml"),
    _Language(
        PLAIN,
        vim="text",
        emacs="text fundamental prog",
        others="txt plain plain-text textmate unknown none",
        suffixes=".txt .text .log",
    ),
    _Language("powershell", vim="ps1", others="pwsh", suffixes=".ps1 .psm1 .psd1"),
    _Language("prisma", suffixes=".prisma"),
    _Language("prolog"),
    _Language(
        "properties",
        vim="jproperties",
        emacs="conf-javaprop spring-boot-properties",
        others="java-properties",
        suffixes=".properties",
    ),
    _Language(
        "proto", vim="proto", emacs="protobuf", helix="protobuf", others="proto3 protobuf", suffixes=".proto"
    ),
    _Language("pug", others="jade", suffixes=".pug .jade"),
    _Language("puppet"),
    _Language("purescript", suffixes=".purs"),
    _Language(
        "python",
        emacs="python python3",
        others="python2 python3 ipython pypy magicpython",
        suffixes=".py .pyi .pyw",
        files="sconstruct sconscript wscript",
    ),
    _Language("r", emacs="ess-r", others="rscript rlang", suffixes=".r", files=".rprofile"),
    _Language("racket", suffixes=".rkt"),
    _Language("razor", others="aspnetcorerazor cshtml", suffixes=".cshtml .razor"),
    _Language("restructuredtext", vim="rst", emacs="rst", helix="rst", suffixes=".rst"),
    _Language(
        "ruby",
        emacs="enh-ruby",
        suffixes=".rb .rake .gemspec .ru .podspec",
        files="gemfile rakefile vagrantfile podfile fastfile brewfile guardfile .irbrc",
    ),
    _Language("rust", emacs="rustic", suffixes=".rs"),
    _Language("sass", emacs="ssass", suffixes=".sass"),
    _Language("scala", vim="sbt", suffixes=".scala .sc .sbt"),
    _Language("scheme", suffixes=".scm .ss"),
    _Language("scss", suffixes=".scss"),
    _Language(
        "shellscript",
        vim="sh bash zsh ksh dash",
        emacs="sh bash",
        helix="bash pkgbuild",
        others="shell shell-script bourne-shell ash mksh",
        suffixes=".sh .bash .zsh .ksh .bats .ebuild",
        files=".bashrc .bash_profile .bash_aliases .bash_logout .profile .kshrc .zshrc .zshenv .zprofile "
        ".zlogin .zlogout pkgbuild apkbuild",
    ),
    _Language("solidity", suffixes=".sol"),
    _Language(
        "sql",
        vim="mysql plsql sqlj",
        others="genericsql postgresql postgres pgsql sqlite tsql plpgsql bigquery mariadb mssql",
        suffixes=".sql",
    ),
    _Language(
        "starlark",
        vim="bzl",
        emacs="bazel",
        others="bazel tiltfile",
        suffixes=".bzl .star",
        files="build build.bazel workspace workspace.bazel tiltfile",
    ),
    _Language("stylus", suffixes=".styl"),
    _Language("supercollider"),
    _Language("svelte", suffixes=".svelte"),
    _Language("swift", suffixes=".swift"),
    _Language("tcl", others="tclsh", suffixes=".tcl"),
    _Language(
        "terraform",
        vim="tf terraform-vars",
        helix="hcl tfvars",
        others="hcl-terraform terraform-vars",
        suffixes=".tf",
    ),
    _Language("toml", emacs="conf-toml", suffixes=".toml", files="pipfile cargo.lock"),
    _Language("typescript", suffixes=".ts .mts .cts"),
    _Language(
        "typescriptreact",
        vim="typescript.tsx",
        emacs="tsx typescript-tsx",
        helix="tsx",
        others="typescript-jsx typescript-react",
        suffixes=".tsx",
    ),
    _Language("vb", others="vbnet visual-basic", suffixes=".vb"),
    _Language(
        "vim",
        emacs="vimrc",
        others="viml vimscript vim-script",
        suffixes=".vim",
        files=".vimrc vimrc .gvimrc gvimrc .exrc _vimrc",
    ),
    _Language("vue", others="vuejs vue-html", suffixes=".vue"),
    _Language(
        "xml", vim="svg", emacs="nxml", others="plist", suffixes=".xml .svg .xsd .plist .csproj .vcxproj"
    ),
    _Language("xsl", vim="xslt", others="xslt", suffixes=".xsl .xslt"),
    _Language(
        "yaml",
        emacs="spring-boot-properties-yaml",
        helix="docker-compose github-action gitlab-ci",
        others="yml dockercompose github-actions-workflow",
        suffixes=".yaml .yml",
        files=".clang-format .clang-tidy",
    ),
    _Language("zig", suffixes=".zig .zon"),
)

_IDS = frozenset(row.id for row in _LANGUAGES)
_BY_NAME = {
    name: row.id
    for row in _LANGUAGES
    for name in (row.id, *f"{row.vim} {row.emacs} {row.helix} {row.others}".split())
}
_BY_SUFFIX = {suffix: row.id for row in _LANGUAGES for suffix in row.suffixes.split()}
_BY_FILE = {name: row.id for row in _LANGUAGES for name in row.files.split()}

# These do not determine the language, so the file's name is used first: Vim's `conf` is any file with `#`
# comments, Emacs' web-mode shows a dozen languages, IntelliJ calls all of C, C++ and Objective-C
# `ObjectiveC`.
_VAGUE = frozenset({PLAIN, "conf", "conf-unix", "conf-space", "conf-colon", "web", "c-or-c++", "objectivec"})

NOT_CODE = frozenset(
    {
        *(
            PLAIN,
            "bibtex",
            "css",
            "csv",
            "diff",
            "dockerfile",
            "git-commit",
            "git-rebase",
            "go.mod",
            "html",
            "ini",
        ),
        *("json", "json5", "jsonc", "latex", "less", "makefile", "markdown", "mdx", "properties"),
        *("restructuredtext", "sass", "scss", "stylus", "toml", "xml", "xsl", "yaml"),
    }
)
"""Prose, data, styles and settings: they would crowd out code in the context."""

SUFFIXES = tuple(suffix for suffix, language in _BY_SUFFIX.items() if language not in NOT_CODE)
"""The suffixes of the names of code files, with their dots."""

_MODE = re.compile(r"(?:-(?:ts|tree-sitter))?(?:-mode)?\Z")
_SHEBANG = re.compile(r"#!\s*(?:\S*/)?(?:env\s+(?:-\S+\s+|\w+=\S*\s+)*(?:\S*/)?)?([A-Za-z]+)")


@lru_cache(maxsize=4096)
def normalise(name: str) -> str:
    """Return midfill's identifier for a name that an editor or a user gives a language.

    A name that is not in the table is returned in lower case with `-` between its words.
    """
    folded = "-".join(name.lower().replace("_", " ").split())
    # `text/x-python` is a MIME type.
    kind = folded.rsplit("/", 1)[-1].removeprefix("x-")
    for known in (folded, kind, _MODE.sub("", kind)):
        if known in _BY_NAME:
            return _BY_NAME[known]
        if known in _VAGUE:
            return known
    # Vim joins file types with dots: `yaml.ansible`, `c.doxygen`.
    parts = [part for part in folded.split(".") if part]
    found = [_BY_NAME[part] for part in parts if part in _BY_NAME] if len(parts) > 1 else []
    if found:
        return next((one for one in found if one != PLAIN), PLAIN)
    return _BY_SUFFIX.get(f".{folded}", folded or PLAIN)


def identify(sent: str, uri: str, first_line: str = "") -> str:
    """Return the language of a document.

    Args:
        sent: the editor's name for it. If it is in the table, it overrides the file's name.
        uri: used next, by its last part.
        first_line: of the text; `#!/bin/sh` determines the language, too.
    """
    language = normalise(sent)
    if language in _IDS and language not in _VAGUE:
        return language
    name = re.split(r"[?#]", re.split(r"[/\\:]", uri)[-1], maxsplit=1)[0]
    # An invalid escape stays as it is.
    return _of_file(unquote(name)) or _of_shebang(first_line) or language


def language_id(name: str) -> str:
    """Return the language for a file's name; "plaintext" if it is not known."""
    return _of_file(PurePath(name).name) or PLAIN


def is_among(names: Iterable[str], language: str, sent: str = "") -> bool:
    """Return whether a language is one of those that a user names, in the words of any editor.

    `sent` is the editor's name for it, which the user may have seen and written down.
    """
    return any(name == sent or normalise(name) == language for name in names)


def _of_file(name: str) -> str | None:
    lower = name.lower()
    if found := _BY_FILE.get(lower) or _BY_SUFFIX.get(PurePath(lower).suffix):
        return found
    # `Dockerfile.dev`, `Makefile.linux`
    return _BY_FILE.get(lower.split(".", 1)[0]) if lower.startswith(("dockerfile.", "makefile.")) else None


def _of_shebang(line: str) -> str | None:
    match = _SHEBANG.match(line)
    language = normalise(match[1]) if match else None
    return language if language in _IDS else None
