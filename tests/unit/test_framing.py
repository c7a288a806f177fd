"""Frames of the wire, as they may come: in any pieces, with anything between them."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midfill.lsp.framing import FrameReader

pytestmark = pytest.mark.fuzz

BODY = b'{"jsonrpc": "2.0"}'
HEADERS = [
    b"Content-Length: 5\r\n",
    b"content-length:5\n",
    b"Content-Length: 99999999999999\r\n",
    b"Content-Length: -1\r\n",
    b"Content-Type: x\r\n",
    b"\r\n",
    b"\n",
    b"hello",
]
pieces = st.lists(st.one_of(st.binary(max_size=40), st.sampled_from(HEADERS)), max_size=12)


def read(parts):
    reader = FrameReader()
    return [body for part in parts for body in reader.feed(part)]


@given(parts=pieces, cuts=st.lists(st.integers(0, 300), max_size=8))
def test_how_the_bytes_are_cut_changes_nothing(parts, cuts):
    data = b"".join(parts)
    at = sorted({0, *(cut for cut in cuts if cut < len(data)), len(data)})
    assert read([data[begin:end] for begin, end in pairwise(at)]) == read([data])


@given(parts=pieces)
def test_after_anything_a_frame_is_read(parts):
    # No more than a body is taken for one: the longest that the headers above announce.
    data = b"".join(parts) + b"\n" * 20
    frame = b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
    assert read([data, frame, frame])[-1] == BODY
