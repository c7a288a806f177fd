"""The folder of the shared engine's sockets: the user's alone, whoever has taken its name."""

import os
import tempfile
from pathlib import Path

import pytest

from midfill.engine.remote.client.shared import runtime_dir
from midfill.errors import EngineError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="no Unix sockets")


@pytest.fixture
def temporary(tmp_path_factory, monkeypatch):
    """An empty temporary folder, on a system without a login's own."""
    # Not named after the test: with the name of xdist's process it would be too long for a socket.
    folder = tmp_path_factory.mktemp("s")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("XDG_RUNTIME_DIR", "MIDFILL_RUNTIME"):
        monkeypatch.delenv(name, raising=False)
    return folder


def first(folder):
    return folder / f"midfill-{os.getuid()}"


def test_it_is_made_for_its_user_alone(temporary):
    assert runtime_dir() == first(temporary)
    assert first(temporary).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("taken_by", ["an open folder", "a link", "a file", "somebody else"])
def test_a_name_that_somebody_has_taken_is_left_and_all_find_the_next(temporary, taken_by, monkeypatch):
    place = first(temporary)
    if taken_by == "a link":
        (temporary / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(temporary / "elsewhere")
    elif taken_by == "a file":
        place.write_text("")
    else:
        place.mkdir(mode=0o700)
        if taken_by == "an open folder":
            place.chmod(0o755)
        else:
            real = Path.lstat

            def of_another(path):
                found = real(path)
                if path != place:
                    return found
                return os.stat_result([*found[:4], os.getuid() + 1, *found[5:]])

            monkeypatch.setattr(Path, "lstat", of_another)
    expected = Path(f"{place}-2")
    assert runtime_dir() == expected
    assert runtime_dir() == expected
    assert expected.stat().st_mode & 0o777 == 0o700


def test_where_all_names_are_taken_the_message_says_what_to_set(temporary, monkeypatch):
    for name in (first(temporary), *(Path(f"{first(temporary)}-{n}") for n in range(2, 11))):
        name.mkdir(mode=0o755)
        name.chmod(0o755)
    with pytest.raises(EngineError, match="not private to you; remove it, or set MIDFILL_RUNTIME"):
        runtime_dir()
    monkeypatch.setenv("MIDFILL_RUNTIME", str(temporary / "mine"))
    assert runtime_dir() == temporary / "mine"
    monkeypatch.setenv("MIDFILL_RUNTIME", "/proc/nowhere")
    with pytest.raises(EngineError, match="Set MIDFILL_RUNTIME to a folder of your own"):
        runtime_dir()


def test_a_folder_that_was_named_is_not_replaced_by_another(temporary, monkeypatch):
    (temporary / "open").mkdir()
    (temporary / "open").chmod(0o755)
    monkeypatch.setenv("MIDFILL_RUNTIME", str(temporary / "open"))
    with pytest.raises(EngineError, match="not private to you"):
        runtime_dir()


def test_a_name_too_long_for_a_socket_is_replaced(temporary, monkeypatch):
    monkeypatch.setenv("MIDFILL_RUNTIME", str(temporary / ("x" * 100)))
    assert runtime_dir() == first(temporary)
