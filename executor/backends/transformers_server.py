"""Streams completions from transformers' continuous batching: one model, one process.

`python -m executor.backends.transformers_server SETTINGS.json`. It speaks the part of the OpenAI
protocol that the load generator uses: token ids in, one server-sent event a token with running
counts out. Started by `executor.backends.transformers`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from collections.abc import AsyncIterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from executor.backends.transformers import FACTS_PREFIX

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


WATCH_INTERVAL_S = 0.5
"""How often the generation thread is looked at."""


def main() -> None:
    """Serve until ended; a failure ends the process although transformers' thread lives on."""
    try:
        serve()
    except BaseException:  # noqa: BLE001  the edge of the process
        traceback.print_exc()
        sys.stdout.flush()
    os._exit(1)


def serve() -> None:
    """Load the model, warm it up and answer requests."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    model = load_model(settings)
    manager = start_batching(model, settings)
    print(FACTS_PREFIX + json.dumps(facts(model, manager, settings)), flush=True)  # noqa: T201  the log
    asyncio.run(CompletionServer(manager, settings).serve())


def load_model(settings: Mapping[str, Any]) -> Any:
    """Return the model on its device, from a folder or with random weights."""
    import torch  # noqa: PLC0415  this process alone needs it
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    device = settings["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, settings["dtype"])
    extra = {"attn_implementation": settings["attention"] or "sdpa"}
    folder = settings["folder"]
    if not settings["has_random_weights"]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra).to(device)
    else:
        config = AutoConfig.from_pretrained(folder)
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **extra)
    return model.eval()


def start_batching(model: Any, settings: Mapping[str, Any]) -> Any:
    """Return the running manager of transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig, GenerationConfig  # noqa: PLC0415

    batching = dict(settings["continuous_batching"])
    # Version 5.17 and 5.23 name it differently.
    names = {field.name for field in fields(ContinuousBatchingConfig)}
    batching["page_size" if "page_size" in names else "block_size"] = settings["tokens_per_block"]
    if model.device.type == "cpu":
        batching.setdefault("num_blocks", settings["cpu_num_blocks"])
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(**batching),
    )
    manager.warmup()
    manager.start()
    return manager


def facts(model: Any, manager: Any, settings: Mapping[str, Any]) -> dict[str, float]:
    """Return capacity and weights in the names of a run's `measured`."""
    num_blocks = manager.continuous_batching_config.num_blocks
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "kv_cache_tokens": float(num_blocks * settings["tokens_per_block"]),
        "weight_bytes_per_gpu": float(weights),
    }


class BadRequestError(Exception):
    """A request that is not one of ours."""


class CompletionServer:
    """Answers /health, /v1/models and /v1/completions.

    Args:
        manager: transformers' continuous batching manager, running.
        settings: What the process was told.
    """

    def __init__(self, manager: Any, settings: Mapping[str, Any]) -> None:
        self._manager = manager
        self._settings = settings
        self._num_requests = 0

    async def serve(self) -> None:
        """Serve as long as the generation thread lives."""
        port = self._settings["port"]
        async with await asyncio.start_server(self._connection, "127.0.0.1", port):
            while self._manager.is_running():
                await asyncio.sleep(WATCH_INTERVAL_S)
        raise RuntimeError("the generation thread has ended")

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                path, body = await _read_request(reader)
                await self._answer(path, body, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if path == "/health":
            _write_json(writer, {})
        elif path == "/v1/models":
            _write_json(writer, {"data": [{"id": self._settings["model"]}]})
        elif path == "/v1/completions":
            await self._complete(body, writer)
        else:
            _write_json(writer, {"error": {"message": f"no {path} here"}}, status=404)

    async def _complete(self, body: bytes, writer: asyncio.StreamWriter) -> None:
        try:
            prompt, num_tokens = self._parsed(body)
        except BadRequestError as error:
            _write_json(writer, {"error": {"message": str(error)}}, status=400)
            return
        writer.write(HEAD)
        async for event in self._events(prompt, num_tokens):
            if writer.transport.is_closing():
                raise ConnectionResetError
            payload = b"data: " + event + b"\n\n"
            writer.write(b"%x\r\n%b\r\n" % (len(payload), payload))
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def _parsed(self, body: bytes) -> tuple[list[int], int]:
        try:
            request = json.loads(body)
            prompt, num_tokens = request["prompt"], int(request["max_tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadRequestError(f"not a completion request: {error!r}") from None
        if not (isinstance(prompt, list) and prompt and all(type(t) is int for t in prompt)):
            raise BadRequestError("the prompt must be a list of token ids")
        if len(prompt) + num_tokens > self._settings["max_seq_len"]:
            raise BadRequestError(
                f"{len(prompt)} + {num_tokens} tokens are over {self._settings['max_seq_len']}"
            )
        return prompt, num_tokens

    async def _events(self, prompt: list[int], num_tokens: int) -> AsyncIterator[bytes]:
        """Yield one event for each step's tokens, with the running count."""
        results: asyncio.Queue[Any] = asyncio.Queue()
        self._num_requests += 1
        request_id = f"r{self._num_requests}"
        self._manager.register_result_handler(request_id, results.put_nowait)
        self._manager.add_request(
            prompt, request_id, max_new_tokens=num_tokens, streaming=True, eos_token_id=-1
        )
        num_sent = 0
        try:
            while True:
                result = await results.get()
                if result.error:
                    yield json.dumps({"error": {"message": str(result.error)}}).encode()
                    return
                count = len(result.generated_tokens)
                if count > num_sent:
                    num_sent = count
                    yield _event(len(prompt), count)
                if result.is_finished():
                    return
        finally:
            if num_sent < num_tokens:
                self._manager.cancel_request(request_id)


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    request_line, *lines = head.split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return request_line.split(" ")[1], body


def _write_json(writer: asyncio.StreamWriter, data: object, *, status: int = 200) -> None:
    body = json.dumps(data).encode()
    head = f"HTTP/1.1 {status} -\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)


def _event(num_prompt_tokens: int, count: int) -> bytes:
    return (
        b'{"choices": [{"index": 0, "text": " t"}], "usage": {"prompt_tokens": %d, '
        b'"completion_tokens": %d}}' % (num_prompt_tokens, count)
    )


if __name__ == "__main__":
    main()
