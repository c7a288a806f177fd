"""Histories are read, and a cloned repository runs nothing meanwhile."""

import os
import stat
import subprocess

import pytest
from planted_history import Planted, grow, stage

from midfill.errors import MidfillError
from midfill.settings import Settings
from midfill.training.history import Repository
from midfill.training.selection import divide, select

SECRET = 'PASSWORD = "hunter2-x9Kq81"\n'


@pytest.fixture
def planted(tmp_path):
    return Planted.new(tmp_path / "project")


def selected(planted):
    return select(Repository(planted.root), Settings())


def test_commits_come_oldest_first_with_their_authors(planted):
    first = planted.commit({"a.py": "a = 1\n"})
    second = planted.commit({"a.py": "a = 2\n"}, author="dependabot[bot]")
    commits = Repository(planted.root).commits(10)
    assert [commit.id for commit in commits] == [first, second]
    assert commits[1].parents == (first,)
    assert [commit.is_bot for commit in commits] == [False, True]


def test_hunks_are_the_lines_that_a_commit_added(planted):
    planted.commit({"a.py": "one\ntwo\nthree\n"})
    planted.commit({"a.py": "zero\none\ntwo\nTHREE\nfour\n", "with space é.py": "new\n"})
    repository = Repository(planted.root)
    ((_, changes),) = repository.changes(repository.commits(10)[-1:])
    by_path = {change.path: change for change in changes}
    hunks = repository.hunks(by_path["a.py"])
    assert [(hunk.first, hunk.end, hunk.removed_first, hunk.removed_end) for hunk in hunks] == [
        (0, 1, 0, 0),
        (3, 5, 2, 3),
    ]
    assert not by_path["with space é.py"].old
    assert repository.hunks(by_path["with space é.py"])[0].first == 0


def test_texts_are_those_of_the_files_and_none_of_what_is_no_text(planted):
    planted.commit({"a.py": "é = 1\n", "b.bin": b"\0\1", "c.py": b"\xff\xfe", "large.py": "x\n" * 300_000})
    repository = Repository(planted.root)
    tree = repository.tree("HEAD")
    texts = repository.texts(tree.values())
    assert {path: texts[blob] for path, blob in tree.items()} == {
        "a.py": "é = 1\n",
        "b.bin": None,
        "c.py": None,
        "large.py": None,
    }


def test_links_and_submodules_are_no_files(planted):
    (planted.root / "link.py").symlink_to("/etc/passwd")
    planted.commit({"a.py": "a = 1\n"})
    assert set(Repository(planted.root).tree("HEAD")) == {"a.py"}


def test_a_folder_without_a_repository_or_commits_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(MidfillError, match=r"no git repository.*--repo"):
        Repository(tmp_path)
    with pytest.raises(MidfillError, match="no commits yet"):
        Repository(Planted.new(tmp_path / "empty").root).commits(10)
    with pytest.raises(MidfillError, match="not a folder"):
        Repository(tmp_path / "nowhere")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_a_repository_of_somebody_else_is_explained(planted, monkeypatch):
    planted.commit({"a.py": "a = 1\n"})
    monkeypatch.setenv("HOME", str(planted.root.parent))
    for path in (planted.root, planted.root / ".git"):
        os.chown(path, 12345, 12345)
    with pytest.raises(MidfillError, match=r"safe\.directory"):
        Repository(planted.root)


def test_a_cloned_repository_runs_nothing(planted, tmp_path):
    marker = tmp_path / "ran"
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {marker}\ncat\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    planted.commit({"a.py": "a = 1\n", ".gitattributes": "*.py diff=mine filter=mine\n"})
    grow(planted, 6)
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for key in (
        *("core.fsmonitor", "diff.external", "diff.mine.textconv", "diff.mine.command", "core.pager"),
        *("gpg.program", "filter.mine.smudge", "filter.mine.clean", "core.sshCommand", "pager.log"),
        *("core.alternateRefsCommand", "core.askPass", "core.editor", "pager.diff", "interactive.diffFilter"),
    ):
        planted.git("config", key, str(program))
    planted.git("config", "core.hooksPath", str(hooks))
    planted.git("config", "log.showSignature", "true")
    command = ["git", "-C", str(planted.root), "diff", "HEAD~1", "HEAD"]
    subprocess.run(command, check=False, capture_output=True)
    assert marker.exists(), "git itself would have run it"
    marker.unlink()
    assert selected(planted).tree
    assert not marker.exists()


def test_the_split_goes_by_time(planted):
    grow(planted, 30)
    selection = selected(planted)
    split = selection.split
    times = {commit.id: commit.time_s for commit in Repository(planted.root).commits(100)}
    parts = [
        [times[one.commit] for found in part for one in found]
        for part in (split.train, split.dev, split.test)
    ]
    assert max(parts[0]) < min(parts[1]) <= max(parts[1]) < min(parts[2])
    assert [len(part) for part in (split.train, split.dev, split.test)] == list(divide(30))
    # The tree that is learnt holds nothing of the held-out commits.
    text = "".join(file.text for file in selection.tree)
    assert f"run_stage_{2 * divide(30)[0] - 1}(" in text
    assert all(f"run_stage_{number}(" not in text for number in range(2 * divide(30)[0], 60))


def test_a_longer_history_is_tested_on_more_commits_but_not_on_most():
    for count in range(4, 2000):
        train, dev, test = divide(count)
        assert train > 0
        assert dev > 0
        assert test > 0
        assert train + dev + test == count
        assert test <= 60
    assert divide(60)[2] >= 20


def test_what_is_left_out_is_counted_by_reason(planted):
    grow(planted, 12)
    long_line = "x = [" + ", ".join(map(str, range(500))) + "]\n"
    planted.commit(
        {
            "vendor/theirs.py": stage(1000),
            "schema_pb2.py": stage(1001),
            "made.py": "# Generated by a tool. DO NOT EDIT.\n" + stage(1002),
            "data.py": long_line,
            "copy.py": (planted.root / "stages.py").read_text(),
            "gpl.py": "# GNU General Public License\n" + stage(1003),
            "ignored.py": stage(1004),
            "config.py": SECRET + stage(1005),
            "page.html": "<p>no code</p>\n",
            ".midfillignore": "ignored.py\n",
        }
    )
    planted.commit({"bot.py": stage(1006)}, author="renovate[bot]")
    planted.commit({"notes.md": "nothing\n"})
    planted.git("checkout", "-q", "-b", "side", "HEAD~1")
    planted.commit({"side.py": stage(1007)})
    planted.git("checkout", "-q", "main")
    planted.git("merge", "-q", "--no-ff", "-m", "merge", "side")
    for number in range(20):
        planted.commit({f"more_{number}.py": stage(2000 + number)})
    selection = selected(planted)
    assert {key: selection.dropped_commits[key] for key in ("merge", "bot", "first commit")} == {
        "merge": 1,
        "bot": 1,
        "first commit": 1,
    }
    assert selection.dropped_commits["no source code"] == 1
    reasons = selection.dropped_files
    assert reasons["vendored or hidden"] >= 1
    assert reasons["generated"] == 2
    assert reasons["minified"] == 1
    assert reasons["another licence"] == 1
    assert reasons["secret"] == 1
    assert reasons["duplicate"] == 1
    assert reasons["ignored"] == 1
    assert reasons["no code"] >= 2
    names = {file.path for file in selection.tree}
    assert not names & {"vendor/theirs.py", "schema_pb2.py", "made.py", "data.py", "gpl.py", "ignored.py"}
    assert len(names & {"copy.py", "stages.py"}) == 1


def test_a_file_that_has_held_a_secret_is_left_out_in_all_versions(planted):
    planted.commit({"config.py": SECRET + stage(1)})
    planted.commit({"config.py": stage(1) + SECRET})
    grow(planted, 12)
    planted.commit({"config.py": "import os\n" + stage(1) + stage(500)})
    selection = selected(planted)
    everything = [
        *selection.tree,
        *(one.file for part in selection.split.test for found in part for one in [found]),
    ]
    assert "config.py" not in {file.path for file in everything}
    assert selection.dropped_files["secret"] == 1


def test_moved_and_repeated_code_is_not_learnt_as_new(planted):
    planted.commit({"old.py": stage(1) + stage(2)})
    grow(planted, 12)
    planted.commit({"old.py": stage(1), "new.py": stage(2)})
    planted.commit({"again.py": stage(3000)})
    planted.commit({"again.py": None})
    planted.commit({"again.py": stage(3000)})
    for number in range(4):
        planted.commit({f"more_{number}.py": stage(2000 + number)})
    selection = selected(planted)
    assert selection.dropped_hunks["moved"] == 1
    assert selection.dropped_hunks["seen before"] == 1
    everything = [
        one for part in (selection.split.train, selection.split.dev, selection.split.test) for one in part
    ]
    assert "new.py" not in {one.file.path for found in everything for one in found}


def test_a_history_that_is_too_short_says_what_is_missing(planted):
    planted.commit({"a.py": stage(1)})
    planted.commit({"a.py": stage(1) + stage(2)})
    with pytest.raises(MidfillError, match=r"1 commits with usable source code.*20 test commits"):
        selected(planted)
