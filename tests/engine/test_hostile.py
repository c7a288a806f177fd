"""A hostile client of each kind leaves the other users of a team's engine what they had.

The server, the client and its enemy are processes of their own. What is compared was measured in turns, in
one run: with the enemy and without.
"""

import asyncio
import contextlib
import json
import sys
import time
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio
from hostile_clients import KINDS

HERE = Path(__file__).parent
ADA = "0123456789abcdef-ada"
NAMES = [one.__name__ for one in KINDS]
STEP_S = 0.02
NUM_ROUNDS, NUM_REQUESTS, NUM_TOKENS = 3, 12, 12


@contextlib.asynccontextmanager
async def process(name, *arguments):
    """A program beside this file; gives its first line. It ends with its stdin."""
    pipe = asyncio.subprocess.PIPE
    one = await asyncio.create_subprocess_exec(
        sys.executable, str(HERE / name), *arguments, stdin=pipe, stdout=pipe
    )
    try:
        line = await one.stdout.readline()
        assert line, f"{name} ended"
        yield line.decode().strip()
    finally:
        one.stdin.close()
        await one.wait()


class Typist:
    """A user who asks for a few tokens again and again, each time with one more character."""

    def __init__(self, client):
        self.client = client
        self.text = "x" * 200

    async def waits_s(self, number):
        waits = []
        for _ in range(number):
            self.text += "y"
            body = {"prompt": self.text, "max_tokens": NUM_TOKENS, "stream": True}
            begun = time.monotonic()
            answer = await self.client.post("/v1/completions", json=body)
            waits.append(time.monotonic() - begun)
            assert answer.status_code == 200, answer.text
            assert answer.text.endswith("data: [DONE]\n\n"), answer.text
        return waits


def p95(values):
    return sorted(values)[int(0.95 * len(values))]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url():
    """A server for all: what one enemy leaves behind is part of what the next test measures."""
    tokens = {ADA: "ada"} | {enemy(kind): kind for kind in NAMES}
    async with process("team_server.py", json.dumps(tokens), str(STEP_S)) as address:
        yield address


def enemy(kind):
    return f"0123456789abcdef-{kind}"


@pytest.mark.serial
@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("kind", NAMES)
async def test_the_others_wait_no_more_than_twice_as_long(kind, url):
    alone, beside = [], []
    headers = {"Authorization": f"Bearer {ADA}"}
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=120) as client:
        typist = Typist(client)
        await typist.waits_s(3)
        for _ in range(NUM_ROUNDS):
            alone += await typist.waits_s(NUM_REQUESTS)
            async with process("hostile_clients.py", kind, url, enemy(kind)):
                beside += await typist.waits_s(NUM_REQUESTS)
    ratio = p95(beside) / p95(alone)
    before, now = (f"{p95(waits) * 1000:.0f} ms" for waits in (alone, beside))
    print(f"{kind}: p95 alone {before}, beside it {now}: {ratio:.2f} times")
    assert ratio <= 2
