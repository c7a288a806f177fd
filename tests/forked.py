"""The process that a test sees in place of a forked server: it hands over its streams and waits for the end.

Usage: python -I -S forked.py SOCKET ARGUMENTS (`forkserver.py` says why). Imports next to nothing.
"""

import _socket
import os
import sys

path, *arguments = sys.argv[1:]
connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
connection.connect(path)
wanted = ascii((os.getcwd(), arguments, dict(os.environ))).encode()  # noqa: PTH109 - pathlib is slow to import
streams = b"".join(number.to_bytes(4, sys.byteorder) for number in range(3))
connection.sendmsg([b"%8d" % len(wanted)], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, streams)])
connection.sendall(wanted)
# Whoever is at the other end of the streams is to see the server close them.
nothing = os.open(os.devnull, os.O_RDWR)
for number in range(3):
    os.dup2(nothing, number)
status = int(connection.recv(8) or b"1")
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
