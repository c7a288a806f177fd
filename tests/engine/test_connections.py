"""Connections to a team's engine: half requests, slow readers, too many. Raw sockets, short deadlines."""

import asyncio
import contextlib
import json
import resource
import socket
import ssl
from urllib.parse import urlsplit

import httpx2
import pytest
import trustme
from serving import TOKEN, hosted, team, until

from midfill.engine.remote.server import guard
from midfill.engine.remote.server.connections import ConnectionLimits
from midfill.engine.remote.server.listen import ListenSpec, raise_file_limit
from midfill.engine.scripted import Rule, Script
from midfill.errors import SettingsError

SHORT_S = 0.2
SHORT = ConnectionLimits(head_s=SHORT_S, body_s=SHORT_S, unread_s=SHORT_S)
GOOD = f"Authorization: Bearer {TOKEN}\r\nHost: localhost\r\n".encode()
BODY = json.dumps({"prompt": "a", "max_tokens": 3}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\n" + GOOD
WHOLE = HEAD + f"Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY


@pytest.fixture(autouse=True)
def _refused_at_once(monkeypatch):
    monkeypatch.setattr(guard, "_REFUSAL_DELAY_S", 0.0)


async def connected(url, data=b"", **options):
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port, **options)
    writer.write(data)
    return reader, writer


async def everything(reader):
    """What the server sends until it hangs up."""
    with contextlib.suppress(ConnectionError):
        return await asyncio.wait_for(reader.read(), 60)
    return b""


async def answer(url, data=WHOLE):
    """The first answer to what is sent, on a connection of its own."""
    reader, writer = await connected(url, data)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
    writer.close()
    return head


async def is_served(url):
    return b" 200 " in await answer(url)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"G",
        b"GET /health HTTP/1.1",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
        b"GET /health HTTP/1.1\r\n" + GOOD,
        b"GET /health HTTP/1.1\r\n" + GOOD + b"X: " + b"x" * 10_000,
        # The next one on the same connection, after a whole request or behind its answer.
        WHOLE + b"GET /hea",
        b"GET /health HTTP/1.1\r\n" + GOOD + b"\r\nGET /health HTTP/1.1\r\n" + GOOD,
        # Bodies.
        WHOLE[:-5],
        HEAD + b"Content-Length: 1000000\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
        # Of requests that are refused before their body is read.
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: evil\r\nContent-Length: 1999\r\n\r\n{",
        b"POST /nowhere HTTP/1.1\r\n" + GOOD + b"Content-Length: 1999\r\n\r\n{",
        b"GET /health HTTP/1.1\r\n" + GOOD + b"Content-Length: 1999\r\n\r\n{",
    ],
)
async def test_half_a_request_is_not_waited_for(sent):
    async with hosted(team(), limits=SHORT) as (_, url):
        reader, writer = await connected(url, sent)
        await everything(reader)
        writer.close()
        assert await is_served(url)


@pytest.mark.parametrize("part", ["head", "body"])
async def test_a_byte_now_and_then_keeps_no_connection(part):
    async with hosted(team(), limits=SHORT) as (_, url):
        start, rest = (b"", WHOLE[:-1]) if part == "head" else (WHOLE[: -len(BODY)], b" " * 10_000)
        reader, writer = await connected(url, start)
        ended = asyncio.create_task(everything(reader))
        for byte in rest:
            writer.write(bytes([byte]))
            done, _ = await asyncio.wait([ended], timeout=SHORT_S / 10)
            if done:
                break
        assert ended.done()
        writer.close()


async def test_who_is_late_is_told_so():
    async with hosted(team(), limits=SHORT) as (_, url):
        reader, writer = await connected(url, b"GET /health HTTP/1.1\r\n")
        assert (await everything(reader)).startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_a_connection_that_rests_between_requests_is_kept():
    async with hosted(team(), limits=SHORT) as (_, url):
        reader, writer = await connected(url)
        for _ in range(2):
            writer.write(WHOLE)
            head = await reader.readuntil(b"\r\n\r\n")
            assert b" 200 " in head
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            # Longer than half a request may take.
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 3 * SHORT_S)
        writer.close()


async def deaf(url):
    """A connection that takes in next to nothing, and of whose answers nothing is read."""
    place = urlsplit(url)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (place.hostname, place.port))
    reader, writer = await asyncio.open_connection(sock=sock)
    writer.transport.pause_reading()
    return reader, writer


async def test_who_does_not_read_an_answer_loses_it_and_frees_the_model(tmp_path):
    log = tmp_path / "log"
    script = Script(rules=[Rule(after="x", text="x" * 60_000), Rule(text="hello")], log=str(log))
    async with hosted(team(), script=script, limits=SHORT) as (host, url):
        body = json.dumps({"prompt": "x", "max_tokens": 60_000, "stream": True}).encode()
        _, writer = await deaf(url)
        writer.write(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await until(lambda: log.exists() and "cancelled" in log.read_text())
        await until(lambda: host._num_running == 0)
        writer.close()
        assert await is_served(url)


async def test_who_reads_no_answers_to_many_requests_loses_the_connection():
    async with hosted(team(), limits=SHORT) as (_, url):
        _, writer = await deaf(url)
        with contextlib.suppress(ConnectionError):
            while not writer.transport.is_closing():
                writer.write(b"GET /nowhere HTTP/1.1\r\n" + GOOD + b"\r\n")
                await asyncio.wait_for(writer.drain(), 60)
        writer.transport.abort()
        assert b"HTTP/1.1 " in await answer(url)


async def test_three_hundred_half_requests_keep_nobody_out():
    async with hosted(team()) as (_, url):
        halves = [await connected(url, b"GET /health HTT") for _ in range(300)]
        assert await is_served(url)
        async with httpx2.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            assert (await client.get("/health")).status_code == 200
        # Those that came first made room, long before their time was up.
        ended = [reader for reader, _ in halves if reader.at_eof() or reader.exception()]
        assert len(ended) >= 300 - ConnectionLimits().anonymous_per_address
        for _, writer in halves:
            writer.close()


async def test_a_user_has_so_many_connections_and_the_one_that_rests_longest_leaves():
    limits = ConnectionLimits(per_user=3)
    page = b"GET /health HTTP/1.1\r\n" + GOOD + b"\r\n"
    async with hosted(team(), limits=limits) as (_, url):
        resting = []
        for _ in range(5):
            reader, writer = await connected(url, page)
            await reader.readuntil(b"\r\n\r\n")
            resting.append((reader, writer))
        await everything(resting[0][0])
        await everything(resting[1][0])
        assert not resting[4][0].at_eof()
        for _, writer in resting:
            writer.close()
        # One that does something is not taken away; then the new one is refused.
        body = json.dumps({"prompt": "long", "max_tokens": 500, "stream": True}).encode()
        head = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode()
        busy = [await connected(url, head + body) for _ in range(3)]
        for reader, _ in busy:
            await reader.readuntil(b"\r\n\r\n")
        assert b" 429 " in await answer(url, page)
        assert not any(reader.at_eof() for reader, _ in busy)
        for _, writer in busy:
            writer.close()


async def test_connections_of_one_address_do_not_push_out_those_of_another():
    limits = ConnectionLimits(anonymous_per_address=0, anonymous=4)
    async with hosted(team(host="0.0.0.0", behind_proxy=True), limits=limits) as (_, url):
        port = urlsplit(url).port
        reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.2", 0))
        writer.write(b"GET")
        crowd = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        for old, _ in crowd[:16]:
            await everything(old)
        assert not reader.at_eof()
        for _, one in [*crowd, (reader, writer)]:
            one.close()


async def test_where_descriptors_run_out_a_stranger_leaves():
    async with hosted(team(), limits=ConnectionLimits(total=5)) as (_, url):
        anonymous = [await connected(url, b"GET") for _ in range(12)]
        assert await is_served(url)
        assert sum(not reader.at_eof() for reader, _ in anonymous) <= 5
        for _, writer in anonymous:
            writer.close()


@pytest.mark.parametrize("how", ["silent", "garbage", "half"])
async def test_half_a_handshake_is_not_waited_for(tmp_path, how):
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    issued.private_key_pem.write_to_path(tmp_path / "box.key")
    (tmp_path / "box.key").chmod(0o600)
    issued.cert_chain_pems[0].write_to_path(tmp_path / "box.pem")
    listen = team(tls_cert=tmp_path / "box.pem", tls_key=tmp_path / "box.key")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with hosted(listen, limits=ConnectionLimits(head_s=5 * SHORT_S)) as (_, url):
        data = {"silent": b"", "garbage": b"GET / HTTP/1.1\r\n\r\n", "half": b"\x16\x03\x01\x02\x00\x01"}[how]
        many = [await connected(url, data) for _ in range(40)]
        reader, writer = await connected(url, WHOLE, ssl=context, server_hostname="localhost")
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        writer.close()
        for old, _ in many:
            await everything(old)
        for _, one in many:
            one.close()


@pytest.mark.parametrize("order", [0, 1])
async def test_two_lengths_of_a_body_are_refused_and_the_connection_ends(order):
    """A proxy that goes by the other one would see another request in the rest."""
    lengths = [b"Content-Length: 4\r\n", b"Transfer-Encoding: chunked\r\n"]
    hidden = b"GET /health HTTP/1.1\r\n" + GOOD + b"\r\n"
    head = HEAD + b"".join(lengths[:: 1 - 2 * order]) + b"\r\n"
    async with hosted(team()) as (_, url):
        for body in (b"0\r\n\r\n" + hidden, f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\n\r\n" + hidden):
            reader, writer = await connected(url, head + body)
            found = await everything(reader)
            assert found.startswith(b"HTTP/1.1 400 ")
            assert b"exclude each other" in found
            assert found.count(b"HTTP/1.1") == 1
            writer.close()
        assert await is_served(url)


async def test_streams_of_loading_are_limited_and_count_as_running(monkeypatch):
    ada, bob = ({"Authorization": f"Bearer {token}"} for token in (TOKEN, TOKEN + "2"))
    async with hosted(team(), script=Script(load_delay_s=300)) as (host, url):
        page = b"GET /midfill/ready HTTP/1.1\r\n" + GOOD + b"\r\n"
        streams = [await connected(url, page) for _ in range(30)]
        heads = [await reader.readuntil(b"\r\n\r\n") for reader, _ in streams]
        assert [b" 200 " in head for head in heads].count(True) == 8
        assert all(b" 200 " in head or b" 429 " in head for head in heads)
        await until(lambda: host._num_running == 8)
        async with httpx2.AsyncClient(base_url=url) as client:
            assert (await client.get("/health", headers=ada)).status_code == 429
            assert (await client.get("/health", headers=bob)).status_code == 200
        for _, writer in streams:
            writer.close()
        await until(lambda: host._num_running == 0)


async def test_a_large_body_counts_as_several_requests():
    async with hosted(team()) as (_, url), httpx2.AsyncClient(base_url=url) as client:

        async def status(token):
            headers = {"Authorization": f"Bearer {token}"}
            body = BODY + b" " * 1_900_000
            return (await client.post("/v1/completions", content=body, headers=headers)).status_code

        statuses = [await status(TOKEN) for _ in range(9)]
        assert statuses[0] == 200
        assert statuses[-1] == 429
        assert await status(TOKEN + "2") == 200


async def test_a_request_ends_after_its_time(monkeypatch, tmp_path):
    log = tmp_path / "log"
    async with hosted(team(), log=str(log)) as (host, url):
        assert await is_served(url)
        monkeypatch.setattr(guard, "_REQUEST_S", SHORT_S)
        for stream in (False, True):
            body = json.dumps({"prompt": "long", "max_tokens": 500, "stream": stream}).encode()
            reader, writer = await connected(
                url, HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
            )
            assert b"[DONE]" not in await everything(reader)
            writer.close()
            await until(lambda: host._num_running == 0)
    outcomes = [json.loads(line)["outcome"] for line in log.read_text().splitlines()]
    assert outcomes == ["finished", "cancelled", "cancelled"]


def test_descriptors_are_raised_as_far_as_they_may():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
        assert team().limits().total == 128
        raise_file_limit()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft == min(hard, 16_384)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_an_owners_socket_has_no_strangers(tmp_path):
    assert ListenSpec(socket=tmp_path / "s").limits().anonymous == 0
    assert team(behind_proxy=True).limits().anonymous_per_address == 0
    assert team().limits().anonymous_per_address == 32


async def test_a_key_that_others_may_read_is_refused(tmp_path):
    issued = trustme.CA().issue_cert("localhost")
    issued.private_key_pem.write_to_path(tmp_path / "box.key")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "box.pem")
    listen = team(tls_cert=tmp_path / "box.pem", tls_key=tmp_path / "box.key")
    for mode in (0o644, 0o640, 0o604):
        (tmp_path / "box.key").chmod(mode)
        with pytest.raises(SettingsError, match=r"Other users may read .*box\.key; run: chmod 600 "):
            async with hosted(listen):
                pass
    (tmp_path / "box.key").chmod(0o600)
    (tmp_path / "box.key").write_text("no key")
    with pytest.raises(SettingsError, match=r"Cannot use .*box\.pem with .*box\.key"):
        async with hosted(listen):
            pass
    with pytest.raises(SettingsError, match="must be given together"):
        async with hosted(team(tls_cert=tmp_path / "box.pem")):
            pass
