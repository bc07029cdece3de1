"""A small completions server over a loopback socket, with every misbehaviour that tests need."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass(kw_only=True)
class CompletionServer:
    gap_s: float = 0.0
    tokens_per_chunk: int = 1
    counts_tokens: bool = True
    short_by: int = 0
    """Tokens left out at the end."""
    dies_after: int | None = None
    """Chunks after which the connection breaks, for prompts that begin with token 0."""
    is_silent: bool = False
    http_status: int = 200
    sends_error: bool = False
    splits_events: bool = False
    closes_idle: bool = False
    """Close after each reply without having announced it."""
    certificate: ssl.SSLContext | None = None
    """Answer over TLS."""
    waits_for: int = 0
    """Answer no request before so many are there."""

    port: int = 0
    num_connections: int = 0
    num_active: int = 0
    most_active: int = 0
    num_broken_off: int = 0
    """Connections that the client dropped in the middle of a reply."""
    written_s: list[float] = field(default_factory=list)
    """When each chunk was written, on the clock of `time.perf_counter`."""
    _all_here: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[CompletionServer]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.certificate)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while request := await self._read_request(reader):
                self.num_active += 1
                self.most_active = max(self.most_active, self.num_active)
                try:
                    await self._answer(request, reader, writer)
                finally:
                    self.num_active -= 1
                if self.closes_idle:
                    break
        except ConnectionError:
            self.num_broken_off += 1
        finally:
            writer.close()

    async def _read_request(self, reader: asyncio.StreamReader) -> dict[str, Any] | None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            request: dict[str, Any] = json.loads(await reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return request

    async def _answer(
        self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self.http_status != 200:
            body = b'{"error": {"message": "no such model"}}'
            head = f"HTTP/1.1 {self.http_status} No\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            return
        if self.is_silent:
            await reader.read()
            raise ConnectionResetError
        if self.num_active >= self.waits_for:
            self._all_here.set()
        await self._all_here.wait()
        writer.write(HEAD)
        await self._stream(request, writer)
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def _stream(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        for number, event in enumerate(self._events(request["max_tokens"] - self.short_by)):
            if number == self.dies_after and request["prompt"][0] == 0:
                writer.transport.abort()
            if self.gap_s:
                await asyncio.sleep(self.gap_s)
            if writer.transport.is_closing():
                raise ConnectionResetError
            self.written_s.append(time.perf_counter())
            await self._write_event(event, writer)
        if self.sends_error:
            await self._write_event(b'{"error": {"message": "out of blocks"}}', writer)
        await self._write_event(b"[DONE]", writer)

    def _events(self, num_tokens: int) -> Iterator[bytes]:
        for first in range(0, num_tokens, self.tokens_per_chunk):
            count = min(first + self.tokens_per_chunk, num_tokens)
            event: dict[str, Any] = {"choices": [{"index": 0, "text": " t1" * (count - first)}]}
            if self.counts_tokens:
                event["usage"] = {"prompt_tokens": 3, "completion_tokens": count}
            yield json.dumps(event).encode()

    async def _write_event(self, payload: bytes, writer: asyncio.StreamWriter) -> None:
        event = b"data: " + payload + b"\n\n"
        chunk = b"%x\r\n%b\r\n" % (len(event), event)
        if self.splits_events:
            writer.write(chunk[:7])
            await asyncio.sleep(0.001)
            chunk = chunk[7:]
        writer.write(chunk)
        await writer.drain()
