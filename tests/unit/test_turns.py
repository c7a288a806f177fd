"""The processes of a test run take turns. A lock is that of an open file, so threads stand for processes."""

import threading

import pytest

from turns import fcntl, turn

pytestmark = pytest.mark.skipif(fcntl is None, reason="tests run in one process on Windows")


def is_waiting(folder):
    """Whether somebody keeps the gate."""
    with (folder / "gate").open("w") as gate:
        try:
            fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_tests_run_beside_each_other(tmp_path):
    with turn(tmp_path, alone=False), turn(tmp_path, alone=False):
        assert not is_waiting(tmp_path)


def test_a_serial_test_waits_for_the_others_and_goes_before_those_that_come_later(tmp_path):
    ended = []

    def run(name, *, alone):
        with turn(tmp_path, alone=alone):
            ended.append(name)

    serial = threading.Thread(target=run, args=["serial"], kwargs={"alone": True})
    later = threading.Thread(target=run, args=["later"], kwargs={"alone": False})
    with turn(tmp_path, alone=False):
        serial.start()
        while not is_waiting(tmp_path):
            pass
        later.start()
        ended.append("first")
    serial.join()
    later.join()
    assert ended == ["first", "serial", "later"]
