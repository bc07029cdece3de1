"""A completions server with the other pages of an inference server, to run as a process too."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from tests.executor.completion_server import CompletionServer

STALL_S = 1.0


@dataclass(kw_only=True)
class OpenAiServer(CompletionServer):
    takes_token_ids: bool = True
    takes_text: bool = True
    known_options: tuple[str, ...] = ("ignore_eos", "stream_options")
    knows_running_counts: bool = True
    fails_after: int = 0
    """Completions after which `failure` happens; 0 is never."""
    failure: str = ""
    """`dies`, `runs_out_of_memory`, `hangs`, `breaks_connections` or `stalls`, once."""
    cached_tokens: int = 0
    """What each prompt is said to have found in the prefix cache."""
    num_speculative_tokens: int = 0
    """Of an engine that speculates: two of three drafts are right in their first token only."""
    num_completions: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def _read_request(self, reader: asyncio.StreamReader) -> dict[str, Any] | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        path = head.split(" ")[1]
        if "content-length:" not in head.lower():
            return {"path": path}
        length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        return {"path": path, **body}

    async def _answer(
        self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        pages = {
            "/health": "",
            "/v1/models": json.dumps({"data": [{"id": "m"}]}),
            "/metrics": self._metrics(),
        }
        path = request.pop("path")
        if path in pages:
            self._write_page(pages[path], writer)
        elif problem := self._problem(path, request):
            body = json.dumps({"error": {"message": problem}})
            self._write_page(body, writer, status=400)
        else:
            self.bodies.append(request)
            request.setdefault("prompt", [1])
            await self._complete(request, reader, writer)

    def _metrics(self) -> str:
        hits = self.num_completions * self.cached_tokens
        return (
            f'vllm:num_preemptions_total{{engine="0"}} {self.num_completions}.0\n'
            f'vllm:prefix_cache_hits_total{{engine="0"}} {hits}.0\n'
            f"{self._speculation_metrics()}"
        )

    def _speculation_metrics(self) -> str:
        if not self.num_speculative_tokens:
            return ""
        drafts, prefix = 3 * self.num_completions, "vllm:spec_decode_num"
        accepted = [2 * self.num_completions] + [0] * (self.num_speculative_tokens - 1)
        lines = [
            f'{prefix}_drafts_total{{engine="0"}} {drafts}.0',
            f'{prefix}_draft_tokens_total{{engine="0"}} {drafts * len(accepted)}.0',
            f'{prefix}_accepted_tokens_total{{engine="0"}} {sum(accepted)}.0',
        ]
        lines += [
            f'{prefix}_accepted_tokens_per_pos_total{{engine="0",position="{position}"}} {count}.0'
            for position, count in enumerate(accepted)
        ]
        return "\n".join(lines) + "\n"

    def _problem(self, path: str, request: dict[str, Any]) -> str:
        kinds = {"/v1/completions": "prompt", "/v1/chat/completions": "messages"}
        if kinds.get(path, "") not in request:
            return f"no {path}"
        given = request.get("prompt")
        if isinstance(given, list) and not self.takes_token_ids:
            return "no token ids"
        if isinstance(given, str) and not self.takes_text:
            return "no text"
        known = {"model", "prompt", "messages", "max_tokens", "stream", *self.known_options}
        if set(request) - known:
            return f"unknown: {sorted(set(request) - known)}"
        options = request.get("stream_options", {})
        if "continuous_usage_stats" in options and not self.knows_running_counts:
            return "no continuous_usage_stats"
        return ""

    async def _complete(
        self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.num_completions += 1
        if self.failure == "stalls":
            if self.num_completions == self.fails_after + 1:
                time.sleep(STALL_S)  # the whole server, as an engine that compiles does
        elif self.fails_after and self.num_completions > self.fails_after:
            if self.failure == "runs_out_of_memory":
                os.write(1, b"torch.OutOfMemoryError: CUDA out of memory.\n")
            if self.failure in ("dies", "runs_out_of_memory"):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.failure == "breaks_connections":
                writer.transport.abort()
            else:
                await reader.read()
            raise ConnectionResetError
        await super()._answer(request, reader, writer)

    def _write_page(self, text: str, writer: asyncio.StreamWriter, status: int = 200) -> None:
        body = text.encode()
        head = f"HTTP/1.1 {status} -\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)


async def serve_for_ever(server: OpenAiServer, port: int) -> None:
    listening = await asyncio.start_server(server._serve, "127.0.0.1", port)
    async with listening:
        await listening.serve_forever()
