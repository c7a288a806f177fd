import os
import sys

import pytest

from midfill.system.programs import find_program

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="files are made executable by their mode")


def program(folder, name, mode=0o755):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text("#!/bin/sh\n")
    file.chmod(mode)
    return str(file)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A current folder that has a program, and another folder."""
    hostile = tmp_path / "hostile"
    program(hostile, "git")
    program(hostile / "bin", "git")
    monkeypatch.chdir(hostile)
    return hostile, tmp_path / "good"


@pytest.mark.parametrize("entry", [".", "", "bin", "./bin", "../hostile", '"."'])
def test_relative_folders_of_the_path_do_not_count(folders, entry):
    _, good = folders
    assert find_program("git", {"PATH": f"{entry}:{good}"}) is None
    expected = program(good, "git")
    assert find_program("git", {"PATH": f"{entry}:{good}:{entry}"}) == expected


def test_no_path_finds_nothing(folders):
    assert find_program("git", {}) is None
    assert find_program("git", {"PATH": ""}) is None


def test_the_environment_is_the_process_s_own_by_default(folders, monkeypatch):
    _, good = folders
    expected = program(good, "git")
    monkeypatch.setenv("PATH", os.pathsep.join([".", str(good)]))
    assert find_program("git") == expected


@pytest.mark.parametrize("name", ["./git", "bin/git", "../hostile/git", "", ".", "..", "gi\0t"])
def test_names_with_a_relative_folder_are_not_found(folders, name):
    hostile, _ = folders
    assert find_program(name, {"PATH": str(hostile)}) is None


def test_an_absolute_name_is_looked_for_there_only(folders):
    _, good = folders
    expected = program(good, "git")
    assert find_program(expected, {"PATH": "."}) == expected
    assert find_program(str(good / "missing"), {"PATH": str(good)}) is None


def test_what_cannot_be_run_is_passed_over(folders, tmp_path):
    _, good = folders
    (tmp_path / "first" / "git").mkdir(parents=True)
    program(tmp_path / "second", "git", mode=0o644)
    expected = program(good, "git")
    path = ":".join(str(folder) for folder in (tmp_path / "first", tmp_path / "second", good))
    assert find_program("git", {"PATH": path}) == expected


@pytest.fixture
def windows(monkeypatch):
    """Make these files, and no others, those of a Windows machine."""

    def make(*files):
        monkeypatch.setattr(os.path, "isfile", lambda file: file in files)

    return make


def on_windows(name, path, **environment):
    return find_program(name, {"PATH": path} | environment, windows=True)


def test_windows_adds_extensions_and_passes_over_relative_folders(windows):
    windows("git.EXE", r".\git.EXE", r"\tools\git.EXE", r"C:tools\git.EXE")
    # Neither a folder without a drive nor one that is relative to a drive's current folder is absolute.
    assert on_windows("git", r".;;\tools;C:tools;tools") is None
    windows("git.EXE", r".\git.EXE", r"C:\Git\git.CMD", r"D:\x\git.EXE")
    assert on_windows("git", r'.;"C:\Git";D:\x') == r"C:\Git\git.CMD"
    assert on_windows("git", r"C:\Git;D:\x", PATHEXT=".EXE") == r"D:\x\git.EXE"
    assert on_windows("git.EXE", r"C:\Git;D:\x") == r"D:\x\git.EXE"
    assert on_windows(r"D:\x\git", "") == r"D:\x\git.EXE"
    for name in (r".\git", r"x\git", "C:git", r"\tools\git"):
        assert on_windows(name, r"C:\Git;D:\x") is None


def test_windows_does_not_run_a_file_without_an_extension(windows):
    windows(r"C:\Git\git", r"C:\Git\git.exe")
    assert on_windows("git", r"C:\Git", PATHEXT=".com;.exe") == r"C:\Git\git.exe"
