"""The response reader and the token stream, whatever way the bytes are cut."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.http_stream import (
    ConnectionLostError,
    ConnectionPool,
    ProtocolViolationError,
    ResponseReader,
    StreamConnection,
)
from executor.token_stream import TokenStream

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def spans(data: bytes, cuts: list[int]) -> Iterator[tuple[int, int]]:
    return pairwise([0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)])


def feed(reader: ResponseReader, data: bytes, cuts: list[int]) -> bytes:
    return b"".join(reader.feed(data[low:high]) for low, high in spans(data, cuts))


@given(
    parts=st.lists(st.binary(min_size=1, max_size=40), max_size=6),
    cuts=st.lists(st.integers(0, 1000), max_size=12),
    trailer=st.sampled_from([b"", b"x-checksum: 0\r\n"]),
)
def test_any_cut_of_a_chunked_response_gives_its_body(
    parts: list[bytes], cuts: list[int], trailer: bytes
) -> None:
    data = CHUNKED + b"".join(b"%X;a=b\r\n%b\r\n" % (len(part), part) for part in parts)
    reader = ResponseReader()
    assert feed(reader, data, cuts) == b"".join(parts)
    assert not reader.done
    feed(reader, b"0\r\n" + trailer + b"\r\n", cuts)
    assert (reader.done, reader.status, reader.keep_alive) == (True, 200, True)


@given(body=st.binary(max_size=60), cuts=st.lists(st.integers(0, 1000), max_size=8))
def test_any_cut_of_a_response_with_a_length_gives_its_body(body: bytes, cuts: list[int]) -> None:
    head = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 400 Bad\r\nConnection: close\r\n"
    data = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    reader = ResponseReader()
    assert feed(reader, data, cuts) == body
    assert (reader.done, reader.status, reader.keep_alive) == (True, 400, False)


def test_a_body_without_length_ends_with_the_connection() -> None:
    reader = ResponseReader()
    assert reader.feed(b"HTTP/1.1 200 OK\r\n\r\nabc") == b"abc"
    assert not reader.done
    assert reader.end_of_connection()


@pytest.mark.parametrize(
    "data",
    [CHUNKED, CHUNKED + b"5\r\nab", OK + b"Content-Length: 3\r\n\r\nab", b"HTTP/1.1 200 OK\r\n"],
)
def test_a_response_that_stops_early_is_incomplete(data: bytes) -> None:
    reader = ResponseReader()
    reader.feed(data)
    assert not reader.end_of_connection()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "not an HTTP response.*SSH-2.0"),
        (CHUNKED + b"xyz\r\n", "chunk size"),
        (CHUNKED + b"1_0\r\n", "chunk size"),
        (CHUNKED + b"2\r\nabcd\r\n", "chunk"),
        (OK + b"Content-Length: many\r\n\r\n", "Content-Length"),
        (b"HTTP/1.1 101 Go on\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", "switches protocols"),
        (OK + b"x-filler: " + b"x" * 70_000, "no end of the headers"),
        (b"x" * 70_000, "not an HTTP response"),
    ],
)
@given(cuts=st.lists(st.integers(0, 1000), max_size=8))
def test_what_is_not_http_is_refused_in_one_line(data: bytes, words: str, cuts: list[int]) -> None:
    with pytest.raises(ProtocolViolationError, match=words) as caught:
        feed(ResponseReader(), data, [])
    assert "\n" not in str(caught.value)
    with pytest.raises(ProtocolViolationError):
        feed(ResponseReader(), data, cuts)


HEADS = {
    "chunked": CHUNKED,
    "counted": OK + b"Content-Length: 9\r\n\r\n",
    "closing": OK + b"Connection: close\r\nContent-Length: 9\r\n\r\n",
    "to the end": OK + b"x-mode: plain\r\n\r\n",
    "old": b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\n",
    "interim": b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + CHUNKED,
}
BODIES = (b"4\r\nabcd\r\n5;a=b\r\nefghi\r\n0\r\nx-sum: 0\r\n\r\n", b"abcdefghi")
AFTERWARDS = (b"", b"\x00trash", b"HTTP/1.1 500 No\r\nContent-Length: 1\r\n\r\nx")
"""What a server may send that nobody asked for."""


@pytest.mark.parametrize("head", HEADS)
@given(
    cuts=st.lists(st.integers(0, 1000), max_size=12),
    afterwards=st.sampled_from(AFTERWARDS),
)
def test_any_cut_gives_the_same_response(head: str, cuts: list[int], afterwards: bytes) -> None:
    is_chunked = HEADS[head].endswith(CHUNKED)
    ends = head != "to the end"
    data = HEADS[head] + BODIES[not is_chunked] + afterwards * ends
    reader = ResponseReader()
    assert feed(reader, data, cuts) == b"abcdefghi"
    assert (reader.status, reader.done) == (200, ends)
    assert reader.end_of_connection()
    if ends:
        assert reader.keep_alive is (head not in ("closing", "old") and not afterwards)


def test_a_trailer_belongs_to_the_response() -> None:
    reader = ResponseReader()
    reader.feed(CHUNKED + b"0\r\n")
    assert not reader.done
    reader.feed(b"x-sum: 0\r\n")
    assert not reader.done
    reader.feed(b"\r\n")
    assert reader.done


class Received:
    """Keeps what came, with its time."""

    def __init__(self) -> None:
        self.pieces: list[tuple[float, bytes]] = []

    def feed(self, at_s: float, body: bytes) -> None:
        self.pieces.append((at_s, body))


async def exchange(pieces: list[bytes]) -> tuple[StreamConnection, Received]:
    """Send a request to a server that answers with these bytes, one write after another."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.001)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        has_answered.set()

    has_answered = asyncio.Event()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    pool = ConnectionPool(
        host="127.0.0.1", port=server.sockets[0].getsockname()[1], connect_limit_s=5.0
    )
    received = Received()
    connection = await pool.connect()
    try:
        connection.send(b"GET / HTTP/1.1\r\n\r\n", received)
        async with asyncio.timeout(20):
            await connection.complete()
    finally:
        connection.abort()
        await has_answered.wait()
        server.close()
    return connection, received


@settings(max_examples=20)
@given(cuts=st.lists(st.integers(1, 100), max_size=5), head=st.sampled_from(sorted(HEADS)))
def test_any_cut_of_what_a_server_writes_gives_the_same_reply(cuts: list[int], head: str) -> None:
    data = HEADS[head] + BODIES[not HEADS[head].endswith(CHUNKED)]
    connection, received = asyncio.run(exchange([data[a:b] for a, b in spans(data, cuts)]))
    assert b"".join(body for _, body in received.pieces) == b"abcdefghi"
    assert connection.reply is not None
    assert connection.reply.status == 200
    stamps_s = [connection.reply.sent_s, *(at_s for at_s, _ in received.pieces)]
    assert stamps_s == sorted(stamps_s)
    assert connection.reply.last_read_s >= stamps_s[-1]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (CHUNKED + b"5\r\nab", ConnectionLostError),
        (OK + b"Content-Length: many\r\n\r\n", ProtocolViolationError),
        (CHUNKED + b"5\r\nabcdefgh", ProtocolViolationError),
    ],
)
def test_a_bad_reply_ends_the_exchange(data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        asyncio.run(exchange([data[:60], data[60:]]))


EVENTS = (
    b': ping\n\ndata: {"choices": [{"text": "a"}], "usage": {"completion_tokens": 1}}\n\n'
    b'data: {"choices":[{"text":"\\"completion_tokens\\":9"}],"usage":{"completion_tokens":4}}\n\n'
    b'data: {"choices":[],"usage":{"completion_tokens":4}}\n\ndata: [DONE]\n\n'
)


@pytest.mark.parametrize("data", [EVENTS, EVENTS.replace(b"\n", b"\r\n")])
@given(cuts=st.lists(st.integers(0, 1000), max_size=8))
def test_any_cut_of_an_event_stream_gives_its_tokens(data: bytes, cuts: list[int]) -> None:
    stream = TokenStream()
    for low, high in spans(data, cuts):
        stream.feed(float(high), data[low:high])
    assert (stream.chunk_tokens, stream.num_tokens, stream.error) == ([1, 3], 4, "")
    end_of_second = data.index(b"data", data.index(b":9")) + 0.0
    assert stream.chunk_s[1] >= end_of_second
