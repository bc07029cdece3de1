"""A streaming HTTP/1.1 client that stamps every read and does nothing else while it reads.

aiohttp and httpx cost 50 to 150 µs for each streamed piece (layers of parsers, a task wake-up a
line); this costs about 10 µs, so one core reads over 20,000 tokens/s with time to spare, and it
adds no dependency. What a piece holds is for the sink to say: see `token_stream`.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass
from typing import Protocol, cast

MAX_HEADER_BYTES = 65536
"""A response head longer than this is not from an HTTP server."""


class ConnectionLostError(Exception):
    """The server closed the connection before its response was complete."""


class ProtocolViolationError(Exception):
    """What the server sent is not an HTTP/1.1 response."""


class ResponseReader:
    """Takes the bytes of one response as they come and returns those of its body."""

    __slots__ = ("_chunked", "_length", "_pending", "done", "keep_alive", "status")

    def __init__(self) -> None:
        self.status = 0
        self.done = False
        self.keep_alive = True
        self._chunked = False
        self._length: int | None = None
        self._pending = b""

    def feed(self, data: bytes) -> bytes:
        """Return the body bytes that these bytes complete.

        Raises:
            ProtocolViolationError: Not HTTP, or a chunk size that is no number.
        """
        data = self._pending + data
        self._pending = b""
        if not self.status:
            data = self._read_head(data)
        if not self.status or not (data or self._length == 0):
            return b""
        if self._chunked:
            return self._read_chunks(data)
        return self._read_plain(data)

    def end_of_connection(self) -> bool:
        """Return whether the response was complete when the server closed the connection."""
        if self.status and not self._chunked and self._length is None:
            self.done = True
        return self.done

    def _read_head(self, data: bytes) -> bytes:
        head, separator, rest = data.partition(b"\r\n\r\n")
        if not separator:
            if len(data) > MAX_HEADER_BYTES:
                raise ProtocolViolationError(f"no end of the headers in {len(data)} bytes")
            self._pending = data
            return b""
        status_line, *lines = head.split(b"\r\n")
        try:
            status = int(status_line.split()[1])
        except (IndexError, ValueError):
            raise ProtocolViolationError(f"not an HTTP response: {status_line[:80]!r}") from None
        if 100 <= status < 200:
            return self._read_head(rest)
        self.status = status
        self._read_headers(lines)
        return rest

    def _read_headers(self, lines: list[bytes]) -> None:
        headers = {
            name.strip().lower(): value.strip().lower()
            for name, _, value in (line.partition(b":") for line in lines)
        }
        self.keep_alive = headers.get(b"connection") != b"close"
        self._chunked = headers.get(b"transfer-encoding") == b"chunked"
        if not self._chunked and b"content-length" in headers:
            self._length = int(headers[b"content-length"])
        if not self._chunked and self._length is None:
            self.keep_alive = False

    def _read_chunks(self, data: bytes) -> bytes:
        """Chunked transfer coding, RFC 9112 section 7.1; only whole chunks are passed on."""
        parts = []
        start = 0
        while (line_end := data.find(b"\r\n", start)) >= 0:
            size = _chunk_size(data[start:line_end])
            if not size:
                # The trailer, which may be empty, ends with an empty line.
                self.done = data.find(b"\r\n\r\n", line_end) >= 0
                break
            chunk_end = line_end + 2 + size
            if len(data) < chunk_end + 2:
                break
            parts.append(data[line_end + 2 : chunk_end])
            start = chunk_end + 2
        self._pending = data[start:]
        return b"".join(parts)

    def _read_plain(self, data: bytes) -> bytes:
        if self._length is not None:
            self._length -= len(data)
            self.done = self._length <= 0
        return data


def _chunk_size(line: bytes) -> int:
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError:
        raise ProtocolViolationError(f"not a chunk size: {line[:40]!r}") from None


class BodySink(Protocol):
    """Takes a reply's body piece by piece."""

    def feed(self, at_s: float, body: bytes) -> None:
        """Take the bytes that came at a time of `time.perf_counter`."""


@dataclass(slots=True)
class Reply:
    """How an exchange went; its body is in the sink."""

    sent_s: float
    status: int = 0
    """HTTP status of a complete reply; 0 before."""
    last_read_s: float = 0.0
    """When the server was last heard; 0 if never."""


class StreamConnection(asyncio.Protocol):
    """One keep-alive connection, one exchange at a time.

    Times are of `time.perf_counter`, taken first thing in the read callback.
    """

    def __init__(self) -> None:
        self.reply: Reply | None = None
        self.num_exchanges = 0
        self._transport: asyncio.Transport | None = None
        self._reader = ResponseReader()
        self._sink: BodySink | None = None
        self._finished: asyncio.Future[None] | None = None

    @property
    def is_reusable(self) -> bool:
        """Whether another request may be sent."""
        return self._transport is not None and self._reader.keep_alive

    def send(self, request: bytes, sink: BodySink) -> Reply:
        """Send a request, and return what tells from now on how far its reply came.

        Raises:
            ConnectionLostError: Closed before the request was sent.
        """
        self.reply = None
        if self._transport is None:
            raise ConnectionLostError("closed before the request was sent")
        self._reader, self._sink = ResponseReader(), sink
        self._finished = asyncio.get_running_loop().create_future()
        self.num_exchanges += 1
        self.reply = Reply(sent_s=time.perf_counter())
        self._transport.write(request)
        return self.reply

    async def complete(self) -> None:
        """Return once the last byte of the reply is here.

        Raises:
            ConnectionLostError: Closed by the server too early.
            ProtocolViolationError: Not an HTTP response.
        """
        if self._finished is not None:
            await self._finished

    def fail(self, error: Exception) -> None:
        """End the exchange with an error and drop the connection, so that the server stops too."""
        if self._finished is not None and not self._finished.done():
            self._finished.set_exception(error)
        self.abort()

    def abort(self) -> None:
        """Drop the connection at once."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (called by the event loop)."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Stamp what came and pass it on (called by the event loop)."""
        now_s = time.perf_counter()
        reply, reader, sink = self.reply, self._reader, self._sink
        if reply is None or sink is None or reader.done:
            self.fail(ProtocolViolationError("bytes that no request asked for"))
            return
        try:
            body = reader.feed(data)
        except ProtocolViolationError as error:
            self.fail(error)
            return
        reply.last_read_s = now_s
        if body:
            sink.feed(now_s, body)
        if reader.done:
            self._complete(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the exchange, well or badly (called by the event loop)."""
        self._transport = None
        if self.reply is not None and self._reader.end_of_connection():
            self._complete(self.reply)
        else:
            self.fail(ConnectionLostError(str(exc or "closed by the server")))

    def _complete(self, reply: Reply) -> None:
        reply.status = self._reader.status
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(None)


class ConnectionPool:
    """Idle connections to one server; the most recently used goes out first."""

    MAX_IDLE_S = 2.0
    """Servers drop idle connections after some seconds (uvicorn: 5); older ones are not trusted."""

    def __init__(self, *, host: str, port: int, connect_limit_s: float, tls: bool = False) -> None:
        self._host = host
        self._port = port
        self._tls = ssl.create_default_context() if tls else None
        self._connect_limit_s = connect_limit_s
        self._idle: list[tuple[float, StreamConnection]] = []

    async def acquire(self) -> StreamConnection:
        """Return an idle connection or a new one.

        Raises:
            OSError: The server cannot be reached; `TimeoutError` is one.
        """
        while self._idle:
            idle_since_s, connection = self._idle.pop()
            if connection.is_reusable and time.perf_counter() - idle_since_s < self.MAX_IDLE_S:
                return connection
            connection.abort()
        return await self.connect()

    async def connect(self) -> StreamConnection:
        """Return a new connection.

        Raises:
            OSError: The server cannot be reached; `TimeoutError` is one.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_limit_s):
                _, connection = await loop.create_connection(
                    StreamConnection, self._host, self._port, ssl=self._tls
                )
        except TimeoutError:
            raise TimeoutError(f"no connection within {self._connect_limit_s:g} s") from None
        return connection

    async def open_ahead(self, count: int) -> None:
        """Connect before the first request, so that a burst does not measure handshakes."""
        for connection in await asyncio.gather(*(self.connect() for _ in range(count))):
            self.release(connection)

    def release(self, connection: StreamConnection) -> None:
        """Take a connection back; one that cannot be used again is dropped."""
        if connection.is_reusable:
            self._idle.append((time.perf_counter(), connection))
        else:
            connection.abort()

    def close(self) -> None:
        """Drop all idle connections."""
        for _, connection in self._idle:
            connection.abort()
        self._idle.clear()
