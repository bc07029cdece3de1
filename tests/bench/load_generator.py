"""How many tokens a second one core reads: `python -m tests.bench.load_generator`.

First what reading a chunk costs without a socket. Then the whole: the server runs in a process
of its own and streams as fast as it can; what limits the rate is the client or, where its share
of a core is below 1, the server.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection

from executor.http_stream import ResponseReader
from executor.load_generator import Endpoint, Prompt, run_load
from executor.protocols import ClosedLoop
from tests.bench import run_bench

STEP_S = 0.002
CONCURRENCY = 128
NUM_REQUESTS = 512
OSL = 512

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":'
    b'[{"index":0,"text":" t1","logprobs":null,"finish_reason":null,"stop_reason":null}],'
    b'"usage":{"prompt_tokens":8,"total_tokens":%d,"completion_tokens":%d}}\n\n'
)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Stream OSL tokens for each request, one write a token."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]))
            writer.write(HEAD)
            for count in range(1, OSL + 1):
                writer.write(chunk_of(count))
                await asyncio.sleep(STEP_S)
            writer.write(b"0\r\n\r\n")
    except asyncio.IncompleteReadError:
        writer.close()


def chunk_of(count: int) -> bytes:
    """Return the chunk of a token."""
    event = EVENT % (8 + count, count)
    return b"%x\r\n%b\r\n" % (len(event), event)


def chunk_cost_s() -> float:
    """Return the processor time that one chunk takes, each in a read of its own."""
    reads = [chunk_of(count) for count in range(1, OSL + 1)]
    costs_s = []
    for _ in range(NUM_REQUESTS):
        reader = ResponseReader()
        reader.feed(HEAD)
        start_s = time.thread_time()
        for data in reads:
            reader.feed(data)
        costs_s.append((time.thread_time() - start_s) / OSL)
    return min(costs_s)


def serve(port: Connection) -> None:
    """Serve until killed."""

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def main() -> None:
    """Print the cost of a chunk; then rate, share of a core and lag."""
    sys.stdout.write(f"{chunk_cost_s() * 1e6:.2f} µs a chunk in the reader\n")
    parent, child = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(child,), daemon=True)
    server.start()
    endpoint = Endpoint(port=parent.recv(), model="m")
    prompts = [Prompt(token_ids=[1] * 8, osl=OSL)] * NUM_REQUESTS
    result = asyncio.run(run_load(endpoint, prompts, protocol=ClosedLoop(concurrency=CONCURRENCY)))
    server.kill()
    tokens = sum(request.osl for request in result.requests)
    rate = tokens / result.wall_s
    sys.stdout.write(
        f"{rate:,.0f} tokens/s at {result.lag.cpu_fraction:.2f} of a core: "
        f"{rate / result.lag.cpu_fraction:,.0f} tokens/s on one; {result.lag.to_json()}\n"
    )


if __name__ == "__main__":
    run_bench(main)
