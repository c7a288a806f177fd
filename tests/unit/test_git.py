"""Whatever a repository's configuration and objects are: reading it runs nothing, stays in it, and ends."""

import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hostile_git import as_git_would, lacking, program, tree_by_hand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planted_history import Planted, grow

from midfill.errors import MidfillError
from midfill.evaluation import git, holes
from midfill.evaluation.git import Git, GitError, NoRepositoryError, is_plain
from midfill.settings import Settings
from midfill.training.history import Repository
from midfill.training.selection import select

pytestmark = pytest.mark.programs

posix = pytest.mark.skipif(sys.platform == "win32", reason="the programs here are shell scripts")


def read_everything(folder):
    """All that midfill does with a repository; nothing but a sentence may come of it."""
    with suppress(MidfillError):
        repository = Repository(folder)
        commits = repository.commits(100)
        for commit in commits:
            repository.tree(commit.id)
        for _, changes in repository.changes(commits):
            for change in changes:
                repository.hunks(change)
        select(repository, Settings())
    with suppress(MidfillError):
        holes.choose(folder, Settings(), count=3, seed=0)


@pytest.fixture(params=["with the variable", "without it"])
def _older_git(request, monkeypatch):
    """The variable that forbids lazy fetches is not known to an older git."""
    if request.param == "without it":
        monkeypatch.delitem(git._ENVIRONMENT, "GIT_NO_LAZY_FETCH")


@posix
@pytest.mark.usefixtures("_older_git")
@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("remote", ["file", "ext"])
def test_missing_objects_are_not_fetched(tmp_path, allowed, remote):
    marker = tmp_path / "ran"
    folder = lacking(tmp_path, marker, allowed=allowed, remote=remote)
    if allowed or remote == "file":
        as_git_would(shutil.copytree(folder, tmp_path / "copy"), "log", "--name-only")
        assert marker.exists(), "git itself would have run it"
        marker.unlink()
    read_everything(folder)
    assert not marker.exists()


@posix
@pytest.mark.usefixtures("_older_git")
def test_the_options_alone_forbid_fetching(tmp_path):
    # Should the repository's configuration ever be read for objects again.
    marker = tmp_path / "ran"
    folder = lacking(tmp_path, marker)
    with pytest.raises(GitError):
        git._ask(folder, "log", "--name-only")
    assert not marker.exists()


@posix
@pytest.mark.usefixtures("_older_git")
@pytest.mark.parametrize("option", ["explicit", "all"])
def test_a_bare_repository_in_a_folder_of_a_clone_is_none(tmp_path, option, monkeypatch):
    marker = tmp_path / "ran"
    bare = lacking(tmp_path, marker, bare=True)
    outer = Planted.new(tmp_path / "outer")
    outer.commit({"a.py": "a = 1\n"})
    inner = shutil.copytree(bare, outer.root / "sub")
    (inner / "code.py").write_text("\n".join(f"value_{n} = compute({n})" for n in range(9)))
    as_git_would(shutil.copytree(inner, tmp_path / "copy"), "log", "--name-only")
    assert marker.exists(), "git itself would have run it"
    marker.unlink()
    # "all" is what a git before 2.38 does.
    monkeypatch.setitem(git._OPTIONS, "safe.bareRepository", option)
    with pytest.raises(NoRepositoryError):
        Git(inner)
    read_everything(inner)
    assert not marker.exists()


# Every option that names a program, in `git help --config` of 2.39 to 2.50.
PROGRAMS = (
    *("core.fsmonitor", "core.pager", "core.editor", "core.sshCommand", "core.askPass", "core.gitProxy"),
    *("core.alternateRefsCommand", "diff.external", "diff.mine.textconv", "diff.mine.command"),
    *("filter.mine.smudge", "filter.mine.clean", "filter.mine.process", "merge.mine.driver"),
    *(
        "gpg.program",
        "gpg.openpgp.program",
        "gpg.ssh.program",
        "gpg.x509.program",
        "gpg.ssh.defaultKeyCommand",
    ),
    *("pager.log", "pager.diff", "pager.rev-parse", "pager.ls-tree", "pager.cat-file", "pager.diff-tree"),
    *("interactive.diffFilter", "credential.helper", "sequence.editor", "uploadpack.packObjectsHook"),
    *("alias.log", "alias.rev-parse", "alias.ls-tree", "alias.cat-file", "alias.diff", "alias.diff-tree"),
    *("trailer.mine.command", "trailer.mine.cmd", "man.mine.cmd", "browser.mine.cmd", "difftool.mine.cmd"),
    *("remote.origin.uploadpack", "remote.origin.vcs", "submodule.sub.update", "bundle.mine.uri"),
)


@posix
@pytest.mark.usefixtures("_older_git")
def test_no_program_of_a_configuration_is_run(tmp_path):
    marker = tmp_path / "ran"
    ours = program(tmp_path, marker)
    planted = Planted.new(tmp_path / "project")
    planted.commit({"a.py": "a = 1\n", ".gitattributes": "* diff=mine filter=mine merge=mine\n"})
    grow(planted, 6)
    for key in PROGRAMS:
        shell = "!" if key.startswith(("alias.", "credential.", "submodule.")) else ""
        planted.git("config", key, f"{shell}{ours}")
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for name in ("post-index-change", "reference-transaction", "post-checkout", "fsmonitor-watchman"):
        shutil.copy(ours, hooks / name)
        shutil.copy(ours, planted.root / ".git" / "hooks" / name)
    for key, value in {
        "core.hooksPath": str(hooks),
        "log.showSignature": "true",
        "core.attributesFile": str(planted.root / ".gitattributes"),
        "include.path": str(tmp_path / "included"),
    }.items():
        planted.git("config", key, value)
    (tmp_path / "included").write_text(f"[core]\n\tfsmonitor = {ours}\n[diff]\n\texternal = {ours}\n")
    (planted.root / ".git" / "info" / "attributes").write_text("* diff=mine filter=mine\n")
    as_git_would(planted.root, "diff", "HEAD~1", "HEAD")
    assert marker.exists(), "git itself would have run it"
    marker.unlink()
    read_everything(planted.root)
    repository = Repository(planted.root)
    assert len(repository.commits(100)) == 8
    assert not marker.exists()


@posix
def test_variables_that_point_git_elsewhere_are_not_passed_on(tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    ours = program(tmp_path, marker)
    planted = Planted.new(tmp_path / "project")
    grow(planted, 6)
    other = Planted.new(tmp_path / "other")
    other.commit({"b.py": "b = 1\n"})
    for key in ("GIT_EXTERNAL_DIFF", "GIT_PAGER", "PAGER", "GIT_SSH_COMMAND", "GIT_ASKPASS", "GIT_EDITOR"):
        monkeypatch.setenv(key, str(ours))
    monkeypatch.setenv("GIT_DIR", str(other.root / ".git"))
    monkeypatch.setenv("GIT_OBJECT_DIRECTORY", str(other.root / ".git" / "objects"))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "diff.external")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", str(ours))
    read_everything(planted.root)
    assert Git(planted.root).root == planted.root.resolve()
    assert not marker.exists()


@posix
def test_git_in_the_current_folder_is_not_run(tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    shutil.copy(program(tmp_path, marker), tmp_path / "git")
    planted = Planted.new(tmp_path / "project")
    grow(planted, 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([".", "", "bin", os.environ["PATH"]]))
    Repository(planted.root).commits(10)
    monkeypatch.setenv("PATH", ".")
    with pytest.raises(GitError, match="git is not on the PATH"):
        Git(planted.root)
    assert not marker.exists()


@pytest.mark.parametrize("elsewhere", ["/", "..", "../../..", "/nonexistent"])
def test_where_the_files_are_is_not_the_configurations_word(tmp_path, elsewhere):
    planted = Planted.new(tmp_path / "project")
    grow(planted, 2)
    planted.git("config", "core.worktree", elsewhere)
    (planted.root / "sub").mkdir()
    found = Git(planted.root / "sub")
    assert found.root == planted.root.resolve()
    assert found.prefix == "sub/"
    assert Repository(planted.root).root == planted.root.resolve()


def test_linked_working_copies_submodules_and_shallow_clones_are_read(tmp_path):
    planted = Planted.new(tmp_path / "project")
    grow(planted, 4)
    head = planted.git("rev-parse", "HEAD")
    planted.git("worktree", "add", "-q", str(tmp_path / "linked"), "HEAD~1")
    linked = Git(tmp_path / "linked")
    assert linked.root == (tmp_path / "linked").resolve()
    assert linked.head == planted.git("rev-parse", "HEAD~1")
    outer = Planted.new(tmp_path / "outer")
    outer.git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(planted.root), "inner")
    assert Repository(outer.root / "inner").commits(1)[0].id == head
    outer.git("clone", "-q", "--depth=2", planted.root.as_uri(), str(tmp_path / "shallow"))
    assert [commit.id for commit in Repository(tmp_path / "shallow").commits(9)][-1] == head
    assert len(Repository(tmp_path / "shallow").commits(9)) == 2


def test_a_repository_of_sha256_hashes_is_read(tmp_path):
    (tmp_path / "project").mkdir()
    planted = Planted(tmp_path / "project")
    planted.git("init", "-q", "--object-format=sha256")
    grow(planted, 2)
    commits = Repository(planted.root).commits(10)
    assert len(commits) == 3
    assert all(len(commit.id) == 64 for commit in commits)


def test_the_history_of_a_folder_below_the_root_counts_for_its_files(tmp_path):
    planted = Planted.new(tmp_path / "project")
    planted.commit({"sub/a.py": "a = 1\n", "b.py": "b = 1\n"})
    planted.commit({"sub/c.py": "c = 1\n"})
    assert set(holes._history(planted.root / "sub")) == {"a.py", "c.py"}
    assert set(holes._history(planted.root)) == {"sub/a.py", "sub/c.py", "b.py"}


def test_a_clone_without_the_contents_of_its_files_is_read_without_them(tmp_path):
    planted = Planted.new(tmp_path / "project")
    grow(planted, 2)
    repository = Repository(planted.root)
    tree = repository.tree("HEAD")
    for blob in tree.values():
        (planted.root / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    assert repository.texts([*tree.values(), "0" * 40]) == dict.fromkeys([*tree.values(), "0" * 40])


HOSTILE_NAMES = [
    *(b"/abs.py", b"..", b"../out.py", b"a/../../out.py", b".git", b".GIT", b".git ", b".git.", b"GIT~1"),
    *(b".g\xe2\x80\x8cit", b"a\nb.py", b"a\x1b[31m.py", b".", b"./a.py", b"a//b.py", b"C:\\a.py", b"C:a.py"),
    *(b"a\\b.py", b"x" * 300 + b".py", b"a.py:stream"),
]


@posix
def test_names_that_lead_out_of_a_repository_are_left_out(tmp_path):
    planted = Planted.new(tmp_path / "project")
    grow(planted, 12)
    blob = planted.git("rev-parse", "HEAD:stages.py")
    entries = [("100644", name, blob) for name in HOSTILE_NAMES]
    commit = tree_by_hand(planted, [*entries, ("100644", b"ok.py", blob)])
    planted.git("update-ref", "refs/heads/main", commit)
    assert set(Repository(planted.root).tree("HEAD")) == {"ok.py"}
    read_everything(planted.root)


@posix
def test_a_path_that_is_a_file_and_a_folder_is_a_folder(tmp_path):
    planted = Planted.new(tmp_path / "project")
    planted.commit({"d/a.py": "a = 1\n", "b.py": "b = 1\n"})
    blob, inner = planted.git("rev-parse", "HEAD:b.py"), planted.git("rev-parse", "HEAD:d")
    commit = tree_by_hand(planted, [("100644", b"d", blob), ("40000", b"d", inner)])
    assert set(Repository(planted.root).tree(commit)) == {"d/a.py"}


@posix
def test_commits_that_were_made_by_hand_are_read(tmp_path):
    planted = Planted.new(tmp_path / "project")
    grow(planted, 2)
    tree, parent = planted.git("rev-parse", "HEAD^{tree}"), planted.git("rev-parse", "HEAD")
    for author in (
        "A\x1fB <a> 1 +0000",
        "nobody",
        "A <a> 99999999999999999999999 +0000",
        "A <a> -5 +0000",
        "",
    ):
        raw = f"tree {tree}\nparent {parent}\nauthor {author}\ncommitter {author}\n\nx\n"
        path = tmp_path / "raw"
        path.write_text(raw)
        parent = planted.git("hash-object", "-t", "commit", "-w", "--literally", str(path))
        planted.git("update-ref", "refs/heads/main", parent)
    assert len(Repository(planted.root).commits(100)) == 8
    read_everything(planted.root)


@posix
def test_a_configuration_that_never_ends_is_given_up(tmp_path, monkeypatch):
    planted = Planted.new(tmp_path / "project")
    grow(planted, 2)
    os.mkfifo(tmp_path / "pipe")
    planted.git("config", "include.path", str(tmp_path / "pipe"))
    monkeypatch.setattr(git, "_ASK_LIMIT_S", 0.3)
    with pytest.raises(GitError, match="took longer than"):
        Git(planted.root)


@pytest.mark.skipif(sys.platform != "linux", reason="another process's memory is bounded on Linux only")
def test_a_tree_that_contains_itself_many_times_ends_within_its_memory(tmp_path, monkeypatch):
    planted = Planted.new(tmp_path / "project")
    planted.commit({"a.py": "a = 1\n"})
    kind, id_ = "100644", planted.git("rev-parse", "HEAD:a.py")
    for _ in range(10):
        names = [f"f{number}".encode() for number in range(10)]
        commit = tree_by_hand(planted, [(kind, name, id_) for name in names])
        kind, id_ = "40000", planted.git("rev-parse", f"{commit}^{{tree}}")
    planted.git("update-ref", "refs/heads/main", commit)
    monkeypatch.setattr(git, "_MAX_OUTPUT_BYTES", 1 << 20)
    monkeypatch.setattr(git, "_MAX_MEMORY_BYTES", 128 << 20)
    with pytest.raises(GitError, match="wrote more than 1 MB"):
        Repository(planted.root).tree("HEAD")
    assert holes._history(planted.root) == {}
    repository = Repository(planted.root)
    with pytest.raises(GitError):
        list(repository.changes(repository.commits(1)))


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    planted = Planted.new(tmp_path / "project")
    grow(planted, 1)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = {path: path.stat().st_mtime_ns for path in planted.root.rglob("*")}
    read_everything(planted.root)
    assert not list((tmp_path / "temporary").iterdir())
    assert before == {path: path.stat().st_mtime_ns for path in planted.root.rglob("*")}


LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *("[core]", "bare = true", "worktree = /", "repositoryformatversion = 99", "[extensions]"),
                *(
                    "objectFormat = sha256",
                    "partialClone = origin",
                    "refStorage = reftable",
                    "worktreeConfig",
                ),
                *('[remote "origin"]', "promisor", "[include]", "path = config", "path = ../../..", "[", '"'),
                *("fsmonitor = touch ran", "hooksPath = .", "logAllRefUpdates = maybe", "compression = 1e9"),
            ]
        ),
        st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace").decode()),
    ),
    max_size=12,
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    planted = Planted.new(tmp_path_factory.mktemp("fuzzed") / "project")
    grow(planted, 3)
    return planted


@pytest.mark.fuzz
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=LINES, head=st.one_of(st.just(b""), st.binary(max_size=60)), shallow=st.binary(max_size=60))
def test_any_configuration_is_read_or_refused_with_a_sentence(fuzzed, config, head, shallow):
    folder = fuzzed.root / ".git"
    saved = {name: (folder / name).read_bytes() for name in ("config", "HEAD")}
    try:
        (folder / "config").write_bytes(saved["config"] + "\n".join(config).encode())
        if head:
            (folder / "HEAD").write_bytes(head)
        if shallow:
            (folder / "shallow").write_bytes(shallow)
        with suppress(MidfillError):
            Repository(fuzzed.root).commits(5)
        holes._history(fuzzed.root)
    finally:
        for name, data in saved.items():
            (folder / name).write_bytes(data)
        (folder / "shallow").unlink(missing_ok=True)


@pytest.mark.fuzz
@given(
    data=st.lists(
        st.tuples(st.sampled_from(["100644", "40000", "120000"]), st.binary(min_size=1, max_size=9))
    )
)
def test_any_name_of_a_tree_stays_below_the_root(data):
    root = Path("/somewhere/project")
    for _, name in data:
        path = os.fsdecode(name)
        if is_plain(path):
            assert Path(os.path.normpath(root / path)).is_relative_to(root)
            assert ".git" not in Path(path).parts
            assert "\0" not in path
