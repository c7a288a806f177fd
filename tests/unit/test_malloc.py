"""What is freed goes back to the system."""

import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.programs,
    pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that keeps what is freed"),
]

BLOCKS = """
import psutil
from midfill.system import malloc as heap

def resident():
    return psutil.Process().memory_info().rss / 1e6

def freed():
    # 100 MB in blocks, each with one behind it that stays.
    blocks = [(bytearray(b"x") * SIZE, bytearray(b"x") * (SIZE // 20)) for _ in range(100_000_000 // SIZE)]
    return [stays for _, stays in blocks]

def left():
    # What the process has more of after that.
    before = resident()
    blocks = freed()
    return resident() - before
"""


def run(code, size):
    """What a new process prints, numbers."""
    command = [sys.executable, "-c", BLOCKS.replace("SIZE", str(size)) + code]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [float(line) for line in out.split()]


def test_what_was_freed_is_given_back():
    code = "before = resident()\nblocks = freed()\n" + 2 * "print(resident() - before)\nheap.trim()\n"
    kept, given_back = run(code, 50_000)
    assert kept > 80
    assert given_back < 20


def test_large_blocks_go_back_at_once_where_that_is_wanted():
    # glibc takes a block of this size for an ordinary one, once it has seen a larger one go.
    larger = 'bytearray(b"x") * 8_000_000\n'
    [usually] = run(larger + "print(left())", 2_000_000)
    [at_once] = run(larger + "heap.give_large_blocks_back_at_once()\nprint(left())", 2_000_000)
    assert usually > 80
    assert at_once < 20
