"""A request while the engine holds it: mutable, owned by one simulator, gone when it ends."""

from __future__ import annotations


class Request:
    """One request from the moment it is queued until its last token has left."""

    __slots__ = (
        "arrival_s",
        "blocks",
        "cached_tokens",
        "context_offset",
        "final_tokens",
        "finish_step",
        "generated",
        "hashes",
        "index",
        "isl",
        "max_tokens",
        "order",
        "osl",
        "pinned",
        "place",
        "predicted_osl",
        "prefill_len",
        "prefilled",
        "prefix_tail",
        "priority",
        "reserved",
        "table",
    )

    def __init__(
        self, *, index: int, arrival_s: float, isl: int, osl: int, max_tokens: int
    ) -> None:
        self.index = index
        self.arrival_s = arrival_s
        self.isl = isl
        self.osl = osl
        """Tokens that it will produce; the engine does not know."""
        self.max_tokens = max_tokens
        """Tokens that the client allows; what a policy that never evicts reserves."""
        self.final_tokens = isl + max_tokens - 1
        """Cached tokens at which it ends at the latest; its last token is never cached."""
        self.priority = 0
        self.predicted_osl = float(osl)
        self.hashes: tuple[int, ...] = ()
        """Identities of the full prefix blocks of its prompt."""
        self.prefix_tail = 0
        """Shared prompt tokens behind the last full block, copied where all before is cached."""
        self.generated = 0
        self.prefill_len = isl
        """Tokens to compute before the next output token: more than the prompt after a pause."""
        self.prefilled = 0
        self.cached_tokens = 0
        """Prompt tokens that block reuse found."""
        self.place = index
        """Running number with which it joined the queue."""
        self.order = -1
        """Running number of its last admission."""
        self.context_offset = 0
        """Cached tokens less the number of steps taken: constant while it decodes."""
        self.finish_step = -1
        """Number of the step that makes its last token; -1 unless it decodes."""
        self.blocks = 0
        """Units of the pool charged at admission."""
        self.reserved = 0
        """Units promised to it, if the policy reserves."""
        self.pinned = 0
        """Leading entries of `table` that it shares through the prefix cache."""
        self.table: list[int] = []
        """Physical blocks of its prompt, in logical order."""

    @property
    def remaining_prefill(self) -> int:
        """Tokens still to compute before its next output token."""
        return self.prefill_len - self.prefilled
