import os
import threading
from pathlib import Path

from midfill.system.log_stream import Outlet, as_text


def read_all(descriptor):
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def test_what_is_written_comes_out_in_order():
    read, write = os.pipe()
    outlet = Outlet(write)
    text = as_text(outlet)
    for number in range(1_000):
        print(f"{number} é \ud800", file=text)
    outlet.end()
    os.close(write)
    assert read_all(read).decode() == "".join(f"{number} é \\ud800\n" for number in range(1_000))


def test_what_there_is_no_room_for_is_dropped_and_counted():
    read, write = os.pipe()
    outlet = Outlet(write)
    line = b"x" * 999 + b"\n"
    # Nobody reads: a pipe takes 64 kB, and the queue 1 MB.
    for _ in range(10_000):
        assert outlet.write(line) == len(line)
    found = []
    reader = threading.Thread(target=lambda: found.append(read_all(read)))
    reader.start()
    outlet.end()
    os.close(write)
    reader.join()
    lines = found[0].splitlines(keepends=True)
    said = [one for one in lines if one != line]
    assert len(said) >= 1
    numbers = [int(one.split()[1]) for one in said]
    assert all(one.startswith(b"midfill: ") and b"dropped here" in one for one in said)
    assert len(lines) - len(said) + sum(numbers) == 10_000


def test_it_ends_though_nobody_reads():
    read, write = os.pipe()
    outlet = Outlet(write)
    outlet.write(b"x" * 500_000)
    outlet.end()
    outlet.write(b"late")
    os.close(read)


def test_a_closed_pipe_and_a_full_disk_raise_nothing():
    read, write = os.pipe()
    os.close(read)
    places = [write, os.open("/dev/full", os.O_WRONLY)] if Path("/dev/full").exists() else [write]
    for place in places:
        outlet = Outlet(place)
        outlet.write(b"one\n")
        outlet.write(b"two\n")
        outlet.end()
        os.close(place)
