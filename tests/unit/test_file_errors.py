"""What a command says of a file that it cannot use: its name, why, and what to do."""

import os

import pytest
from click.testing import CliRunner

from midfill.adapters.format import read_config
from midfill.bench.engine_profile import EngineProfile
from midfill.cli.main import cli
from midfill.errors import AdapterError, MidfillError, SettingsError
from midfill.settings import load
from midfill.system.file_errors import why_unreadable, why_unwritable


def said(*arguments):
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code != 0
    return f"{done.output} {done.exception}"


READERS = [
    ("bench", "replay", "PATH"),
    ("bench", "load", "--trace", "PATH"),
    ("complete", "PATH:1:1"),
    ("complete", "TEXT:1:1", "--engine", "scripted:PATH"),
    ("engine", "serve", "--port", "0", "--tokens", "PATH"),
    ("engine", "serve", "--port", "0", "--tokens", "TOKENS", "--tls-cert", "PATH", "--tls-key", "TEXT"),
    ("engine", "serve", "--port", "0", "--tokens", "TOKENS", "--tls-cert", "TEXT", "--tls-key", "PATH"),
    ("eval", "calibrate", "PATH"),
    ("eval", "infilling", "PATH"),
    ("replay", "PATH"),
]
WRITERS = [("serve", "--record", "PATH")]


def filled(arguments, path, folder):
    (folder / "text").write_text("a = 1\n")
    (folder / "tokens").write_text("me 0123456789abcdefghij\n")
    (folder / "tokens").chmod(0o600)
    places = {"PATH": path, "TEXT": folder / "text", "TOKENS": folder / "tokens"}
    for name, place in places.items():
        arguments = [one.replace(name, str(place)) for one in arguments]
    return arguments


@pytest.mark.parametrize("arguments", READERS, ids=" ".join)
def test_a_file_that_is_not_there_is_named_with_the_remedy(arguments, tmp_path):
    path = tmp_path / "nowhere"
    message = said(*filled(arguments, path, tmp_path))
    assert f"{path}: there is no such file. Check the path." in message
    assert "Errno" not in message


@pytest.mark.parametrize("arguments", WRITERS, ids=" ".join)
def test_a_folder_that_is_not_there_is_named_with_the_remedy(arguments, tmp_path):
    path = tmp_path / "nowhere" / "new"
    message = said(*filled(arguments, path, tmp_path))
    assert f"{path}: its folder does not exist. Create the folder, or choose another path." in message
    assert "Errno" not in message


@pytest.mark.parametrize("command", [("bench", "replay"), ("bench", "load")])
def test_a_source_tree_that_is_not_there_is_named(command, tmp_path):
    assert f"'{tmp_path / 'nowhere'}' does not exist" in said(*command, "--files", tmp_path / "nowhere")


def test_an_adapter_that_is_not_there_is_named(tmp_path):
    with pytest.raises(AdapterError, match=r"There is no folder .*nowhere\. Check the path\."):
        read_config(tmp_path / "nowhere")


def test_a_profile_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MidfillError, match=r"nowhere: there is no such file\. Check the path\."):
        EngineProfile.read(tmp_path / "nowhere")


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    assert f"{tmp_path}: it is a folder. Give a file." in said("replay", tmp_path)
    with pytest.raises(SettingsError, match=r"it is a folder\. Give a file\.$"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("error", "read", "written"),
    [
        (
            PermissionError(13, "Permission denied"),
            "Check its permissions",
            "Check the permissions, or choose",
        ),
        (NotADirectoryError(20, "Not a directory"), "not a folder. Check the path", "Check the path"),
        (OSError(28, "No space left on device"), "No space left on device", "Free some space"),
        (OSError(30, "Read-only file system"), "Read-only file system", "read-only. Choose another path"),
        (ValueError("it is in UTF-16. Save it as UTF-8."), "Save it as UTF-8", "Save it as UTF-8"),
        (OSError(), "OSError", "OSError"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="numbers of errors")
def test_why_a_file_cannot_be_used(error, read, written):
    assert read in why_unreadable(error)
    assert written in why_unwritable(error)
    assert not why_unreadable(error).endswith(".")
