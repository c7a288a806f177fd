"""Ignore files mean what they mean to git, and no pattern takes long."""

import os
import subprocess
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from midfill.completion.context.ignore import IgnoreRules
from profiles import examples

PIECES = ["a", "b", "ab", "*", "**", "***", "?", "/", "/**/", "**/", "/**", "\\", " ", "!", "#", "é", "."]
PIECES += [
    "[ab]",
    "[!a]",
    "[^b]",
    "[a-c]",
    "[]a]",
    "[[:alpha:]]",
    "[[:x:]]",
    "[a",
    "]",
    "-",
    "[a-]",
    "[\\]a]",
]
PATTERNS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)
FILES = st.lists(PATTERNS, min_size=1, max_size=4)
PATHS = [
    *("a", "b", "ab", "aab", "é", "a b", "!", "#", "a/a", "a/b", "a/ab", "b/a", "ab/a", "a/b/a", "a/b/ab"),
    *(
        "b/b/b",
        "a/a/a/a",
        "ab/ab/b",
        "a.b",
        ".a",
        "a/.b",
        "[a",
        "a]",
        "a-",
        "-",
        "a/é/b",
        "aé/b",
        "abab",
        "ba",
    ),
]
FOLDERS = {"/".join(path.split("/")[:depth]) for path in PATHS for depth in range(1, path.count("/") + 1)}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    for path in sorted({*PATHS, *FOLDERS}):
        if path in FOLDERS:
            (root / path).mkdir(parents=True, exist_ok=True)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).touch()
    return root


def by_git(root, patterns, paths):
    """What `git check-ignore` says of each path: the pattern that decides, or "" for none."""
    (root / ".gitignore").write_bytes(patterns)
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    command = ["git", "-C", str(root), "check-ignore", "--no-index", "-z", "-v", "-n", "--stdin"]
    given = b"".join(os.fsencode(path) + b"\0" for path in paths)
    done = subprocess.run(command, input=given, capture_output=True, check=False, env=environment)
    assert done.returncode in {0, 1}, done.stderr
    fields = done.stdout.split(b"\0")[:-1]
    return list(fields[2::4])


def ours(rules, path):
    """The same by our rules: a folder that is ignored decides for what is in it."""
    parts = path.split("/")
    for depth in range(1, len(parts)):
        if rules.verdict("/".join(parts[:depth]), is_folder=True):
            return True
    return rules.verdict("/".join(parts), is_folder=path in FOLDERS)


@pytest.mark.fuzz
@settings(
    max_examples=examples(5),
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(lines=FILES, end=st.sampled_from(["\n", "\r\n"]))
@example(lines=["a**/b"], end="\n")
@example(lines=["**\\/b"], end="\n")
@example(lines=["a\\ ", "b  ", "\\#", "\\!"], end="\n")
@example(lines=["*", "!a/", "!a/b", "a/**"], end="\n")
@example(lines=["a/**/**/b"], end="\n")
@example(lines=["[a-\\c]", "[[:alpha:]-z]", "[!]a]b"], end="\n")
@example(lines=["/", "//", "a//b", "!"], end="\n")
def test_a_path_is_ignored_if_git_ignores_it(repository, lines, end):
    patterns = end.join(lines).encode() + end.encode()
    rules = IgnoreRules([patterns])
    paths = sorted({*PATHS, *FOLDERS})
    for path, decided in zip(paths, by_git(repository, patterns, paths), strict=True):
        expected = None if not decided else not decided.startswith(b"!")
        assert ours(rules, path) == expected, (path, decided)


HOSTILE = {
    "stars": b"*a" * 14 + b"*b",
    "many stars": b"*a" * 400 + b"*b",
    "double stars": b"**/a/" * 100 + b"b",
    "nothing but double stars": b"**/" * 30_000 + b"b",
    "stars and double stars": b"**/*a*a*a/" * 60 + b"b",
    "sets": b"*[a-z]" * 200 + b"b",
    "negated sets": b"*[!b]" * 200 + b"b",
    "long sets": b"[" + b"a-z" * 30_000 + b"]*",
    "unended sets": b"[a" * 40_000,
    "many patterns": b"\n".join(b"*%d*a*a*a" % number for number in range(1_900)),
    "too many patterns": b"\n".join(b"*%d*" % number for number in range(12_000)),
    "backslashes": b"\\" * 99_999,
    "blanks": b"a" + b" " * 99_000 + b"b",
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("path", ["a" * 80, "a" * 255, "a/" * 120 + "a", "a" * 250 + "/" + "a" * 250])
def test_no_pattern_takes_long(kind, path):
    begun = time.process_time()
    IgnoreRules([HOSTILE[kind]]).verdict(path, is_folder=False)
    assert time.process_time() - begun < 10


def test_what_no_project_has_is_ignored():
    assert IgnoreRules([HOSTILE["too many patterns"]]).verdict("main.py", is_folder=False)
    assert IgnoreRules([b""]).verdict("a/" * 1_000 + "a.py", is_folder=False)
    assert IgnoreRules([b""]).verdict("a.py", is_folder=False) is None
