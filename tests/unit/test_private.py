"""What midfill keeps is its owner's alone, however lax the system is, and also where it was not before."""

import os
import sys

import pytest
from planted_adapters import write_adapter, write_base

from midfill.adapters.bindings import Bindings
from midfill.adapters.registry import Registry
from midfill.completion.stats import acceptance as feedback
from midfill.completion.stats.acceptance import AcceptanceCounts
from midfill.models import store
from midfill.system import last_request, text_files
from midfill.system.folders import data_folder, state_folder
from midfill.system.private import create_private, private_folder
from midfill.training import pipeline as learn
from midfill.training import worker

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="modes mean nothing on Windows")


@pytest.fixture(autouse=True)
def _lax(tmp_path, monkeypatch):
    """A system on which everybody may read and write what is made, and an older midfill's folders."""
    for name in ("DATA", "STATE", "CACHE"):
        monkeypatch.delenv(f"MIDFILL_{name}", raising=False)
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name))
    before = os.umask(0)
    for folder in (data_folder() / "adapters", data_folder() / "training", state_folder()):
        folder.mkdir(parents=True)
    store.cache_root().mkdir(parents=True)
    yield
    os.umask(before)


def open_to_others(folder):
    return [path for path in (folder, *folder.rglob("*")) if path.stat().st_mode & 0o077]


def test_adapters_and_where_they_are_used_are_their_owners_alone(tmp_path):
    base = write_base(tmp_path / "base")
    entry = Registry().add(write_adapter(tmp_path / "a"), name="mine", base=base)
    Bindings().bind(entry.digest, workspace=tmp_path)
    assert not open_to_others(data_folder() / "adapters")
    assert len(list((data_folder() / "adapters").rglob("*"))) >= 5
    Registry().remove("mine")
    assert not Registry().entries()


def test_counts_and_activity_are_their_owners_alone():
    path = feedback.counts_path()
    path.write_text('{"counts": {}}')
    feedback.add(path, {"model": {"python": AcceptanceCounts(offered=1)}})
    last_request.make_marker()
    assert not open_to_others(path.parent)
    assert feedback.read(path)["model"]["python"].offered == 1


def test_a_training_is_its_owners_alone():
    with worker._alone("mine"):
        pass
    learn.record_comparison([], "0" * 64)
    assert not open_to_others(data_folder() / "training")


def test_the_cache_is_its_owners_alone_unless_it_is_shared_on_purpose(tmp_path, monkeypatch):
    with store.new_folder("a"):
        assert not store.cache_root().stat().st_mode & 0o077
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    monkeypatch.setenv("MIDFILL_CACHE", str(shared))
    with store.new_folder("a"):
        assert shared.stat().st_mode & 0o777 == 0o755
    monkeypatch.setenv("MIDFILL_CACHE", str(tmp_path / "new"))
    with store.new_folder("a"):
        assert not (tmp_path / "new").stat().st_mode & 0o077


def test_missing_folders_above_are_made_private_and_others_stay(tmp_path):
    tmp_path.chmod(0o755)
    private_folder(tmp_path / "a" / "b" / "c")
    assert not open_to_others(tmp_path / "a")
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        private_folder(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        private_folder(tmp_path / "file" / "below")


def test_files_that_are_there_are_tightened(tmp_path):
    for name, write in (
        ("a", lambda path: text_files.replace(path, "x", private=True)),
        ("b", lambda path: create_private(path).close()),
    ):
        (tmp_path / name).write_text("before")
        (tmp_path / name).chmod(0o666)
        write(tmp_path / name)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
        assert "before" not in (tmp_path / name).read_text()


def test_links_lead_where_they_did(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    private_folder(tmp_path / "link" / "inner")
    assert (tmp_path / "disk" / "inner").is_dir()
