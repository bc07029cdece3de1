"""What stands between a client and the engine's step loop: HTTP, tokenisation, streaming."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontEndConstants:
    """Serial host work outside the step, and how far the step loop runs ahead of it.

    The front end is one event loop: its work per request and per token adds up, so it
    limits the rate of a deployment when the GPU is faster.
    """

    request_s: float = 0.0
    """Accepting one request: parsing, tokenising, handing it to the engine."""
    prompt_token_s: float = 0.0
    """The same, per prompt token."""
    active_stream_s: float = 0.0
    """Delay that each stream being served adds to a new request."""
    first_token_s: float = 0.0
    """From the end of the step that makes the first token to the client."""
    accepts_together: bool = False
    """Whether requests that come together pass together.

    An event loop takes every request a hop further before it returns to the first, so a burst
    has passed when the work for all of it is done. Else they pass one after the other.
    """
    read_tokens: int = 0
    """Prompt tokens of one read of a request's body; the rest waits for the loop's next turn.

    0 where bodies are read at once.
    """
    streamed_token_s: float = 0.0
    """Serial work for one streamed token."""
    streamed_chunk_s: float = 0.0
    """Serial work for one chunk that is written to a client, on top of that for its tokens."""
    merged_streams: int = 0
    """Streams up to which tokens that wait for the loop leave in one chunk.

    vLLM takes 128 outputs between two turns of its loop. A step of no more is taken together with
    all steps that wait, so a loop that falls behind writes fewer chunks; of a larger step each
    part waits for a turn of its own, and every token is a chunk.
    """
    jitter_s: float = 0.0
    """Standard deviation of a step's time that does not grow with it."""
    jitter_fraction: float = 0.0
    """Standard deviation of a step's time as a share of it."""
    steps_in_flight: int = 2
    """Steps scheduled before the first one's output is known: 2 under overlap scheduling."""
    keeps_waves: bool = False
    """Whether equal requests of a closed loop stay together wave after wave."""
    slot_lag: int = 0
    """Batch slots that finished requests still hold (TensorRT-LLM 1.0 release candidates: 1)."""

    def with_tokens_per_chunk(self, tokens_per_chunk: float) -> FrontEndConstants:
        """Return the same where tokens are streamed several at a time."""
        return replace(
            self,
            streamed_token_s=self.streamed_token_s / tokens_per_chunk,
            streamed_chunk_s=self.streamed_chunk_s / tokens_per_chunk,
        )

    def least_request_s(self, isl: float, osl: float, streams: ArrayLike) -> NDArray[np.float64]:
        """Return the serial front-end time of a request where nothing else limits the rate.

        Args:
            isl: Prompt tokens.
            osl: Output tokens.
            streams: Requests that are served at a time; as few as may be merged write few chunks.
        """
        merged = np.asarray(streams) <= self.merged_streams
        token_s = self.streamed_token_s + np.where(merged, 0.0, self.streamed_chunk_s)
        return np.asarray(self.request_s + isl * self.prompt_token_s + osl * token_s)
