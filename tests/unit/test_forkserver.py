"""Forked processes of midfill are, to whoever starts them, what the real command starts."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import forkserver

pytestmark = [
    pytest.mark.programs,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the real command is used"),
]


def run(*words, **options):
    return subprocess.run(
        forkserver.command(*words), capture_output=True, text=True, check=False, timeout=60, **options
    )


def test_output_errors_and_status_are_those_of_the_command(tmp_path):
    good, bad = run("--version"), run("no-such-command", cwd=tmp_path)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("midfill ")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "no-such-command" in bad.stderr


def test_the_environment_and_the_folder_are_those_of_the_caller(tmp_path):
    (tmp_path / "config.toml").write_text("no_such_setting = 1\n")
    (tmp_path / "a.py").write_text("")
    done = run("complete", "a.py:1:1", cwd=tmp_path, env={"MIDFILL_CONFIG": "config.toml"})
    assert done.returncode == 1
    assert "no_such_setting" in done.stderr


@pytest.mark.parametrize("signal", ["terminate", "kill"])
def test_who_is_killed_takes_the_server_along(signal):
    command = forkserver.command("serve")
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        # Its own end of the pipe stays open, so the end of the output is that of the server.
        getattr(process, signal)()
        assert process.stdout.read() == b""


def test_starts_that_are_given_up_at_once_end_nothing_else():
    def start(number):
        process = subprocess.Popen(
            forkserver.command("serve"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with process:
            if number % 2:
                process.kill()

    run("--version")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(start, range(40)))
    assert run("--version").returncode == 0
