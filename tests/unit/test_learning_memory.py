"""Memory that goes back to the system. In processes of their own: the C library's state is a process's."""

import subprocess
import sys

import pytest

linux = pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that keeps what is freed")

BLOCKS = """
import psutil
from midfill.learning import memory

def resident():
    return psutil.Process().memory_info().rss / 1e6

def freed():
    # 100 MB in blocks, each with one behind it that stays.
    blocks = [(bytearray(b"x") * SIZE, bytearray(b"x") * 4000) for _ in range(100_000_000 // SIZE)]
    return [stays for _, stays in blocks]

before = resident()
"""


def run(code, size):
    command = [sys.executable, "-c", BLOCKS.replace("SIZE", str(size)) + code]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [float(line) for line in out.split()]


@linux
def test_what_was_freed_is_given_back():
    code = "kept = freed()\nprint(resident() - before)\nmemory.give_back()\nprint(resident() - before)"
    kept, given_back = run(code, 50_000)
    assert kept > 80
    assert given_back < 20
