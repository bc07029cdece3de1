"""A streaming HTTP/1.1 client that stamps every read and does nothing else while it reads.

aiohttp and httpx cost 50 to 150 µs for each streamed piece (layers of parsers, a task wake-up a
line); httptools under a bare `asyncio.Protocol` costs about 10 µs, so one core reads over 20,000
tokens/s with time to spare. What a piece holds is for the sink to say: see `token_stream`.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass
from typing import Protocol, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

MAX_HEADER_BYTES = 65536
"""A response head longer than this is not from an HTTP server."""

FINAL_STATUS = 200
"""Responses with a smaller status come before the one that answers the request."""


class ConnectionLostError(Exception):
    """The server closed the connection before its response was complete."""


class ProtocolViolationError(Exception):
    """What the server sent is not an HTTP/1.1 response."""


class ResponseReader:
    """Takes the bytes of one response as they come and returns those of its body.

    llhttp reads them and calls the `on_` methods; interim responses (1xx) are passed over.
    """

    __slots__ = (
        "_body", "_has_end", "_num_head_bytes", "_parser", "done", "keep_alive", "status",
    )  # fmt: skip

    def __init__(self) -> None:
        self.status = 0
        self.done = False
        self.keep_alive = True
        self._parser = HttpResponseParser(self)
        self._num_head_bytes = 0
        self._body: list[bytes] = []
        self._has_end = False

    def feed(self, data: bytes) -> bytes:
        """Return the body bytes among these.

        Raises:
            ProtocolViolationError: Not an HTTP response.
        """
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            self._end_badly("it switches protocols", data)
        except HttpParserError as error:
            self._end_badly(str(error), data)
        if not self.status:
            self._limit_head(len(data))
        body = b"".join(self._body)
        self._body.clear()
        return body

    def end_of_connection(self) -> bool:
        """Return whether the response was complete when the server closed the connection."""
        if self.status and not self._has_end:
            self.done = True
        return self.done

    def on_message_begin(self) -> None:
        """Keep no connection that brings more than was asked for."""
        if self.done:
            self.keep_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note whether the body says where it ends."""
        name = name.lower()
        if name == b"content-length" or (
            name == b"transfer-encoding" and value.lower().endswith(b"chunked")
        ):
            self._has_end = True

    def on_headers_complete(self) -> None:
        """Keep the status."""
        status = self._parser.get_status_code()
        if status >= FINAL_STATUS and not self.done:
            self.status = status

    def on_body(self, body: bytes) -> None:
        """Keep what came of the body."""
        if not self.done:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """End the response."""
        if self.status and not self.done:
            self.done, self.keep_alive = True, self._parser.should_keep_alive()

    def _end_badly(self, why: str, data: bytes) -> None:
        self.keep_alive = False
        if not self.done:
            raise ProtocolViolationError(f"not an HTTP response ({why}): {data[:80]!r}") from None

    def _limit_head(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > MAX_HEADER_BYTES:
            raise ProtocolViolationError(f"no end of the headers in {self._num_head_bytes} bytes")


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
