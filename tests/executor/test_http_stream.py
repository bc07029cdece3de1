"""The response reader and the token stream, whatever way the bytes are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.http_stream import ProtocolViolationError, ResponseReader
from executor.token_stream import TokenStream

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def feed(reader: ResponseReader, data: bytes, cuts: list[int]) -> bytes:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return b"".join(reader.feed(data[low:high]) for low, high in pairwise(edges))


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


def test_a_chunked_body_that_stops_early_is_incomplete() -> None:
    reader = ResponseReader()
    reader.feed(CHUNKED + b"5\r\nab")
    assert not reader.end_of_connection()


@pytest.mark.parametrize("data", [b"SSH-2.0-OpenSSH\r\n\r\n", CHUNKED + b"xyz\r\n", b"x" * 70_000])
def test_what_is_not_http_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolViolationError):
        ResponseReader().feed(data)


EVENTS = (
    b': ping\n\ndata: {"choices": [{"text": "a"}], "usage": {"completion_tokens": 1}}\n\n'
    b'data: {"choices":[{"text":"\\"completion_tokens\\":9"}],"usage":{"completion_tokens":4}}\n\n'
    b'data: {"choices":[],"usage":{"completion_tokens":4}}\n\ndata: [DONE]\n\n'
)


@pytest.mark.parametrize("data", [EVENTS, EVENTS.replace(b"\n", b"\r\n")])
@given(cuts=st.lists(st.integers(0, 1000), max_size=8))
def test_any_cut_of_an_event_stream_gives_its_tokens(data: bytes, cuts: list[int]) -> None:
    stream = TokenStream()
    edges = [0, *sorted(cut % len(data) for cut in cuts), len(data)]
    for low, high in pairwise(edges):
        stream.feed(float(high), data[low:high])
    assert (stream.chunk_tokens, stream.num_tokens, stream.error) == ([1, 3], 4, "")
    end_of_second = data.index(b"data", data.index(b":9")) + 0.0
    assert stream.chunk_s[1] >= end_of_second
