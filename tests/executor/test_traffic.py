"""Prompts have exact lengths and their own tokens; a warm-up sees every batch shape."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from executor.protocols import ClosedLoop, OfflineBurst, OpenLoop
from executor.traffic import (
    MOST_WARM_UP_TOKENS,
    Traffic,
    Warmth,
    protocol_of,
    random_prompts,
    warm_up_rounds,
    warmth_for,
)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=20), st.integers(0, 300))
def test_prompts_have_exact_lengths_and_known_tokens(isl: list[int], prefix: int) -> None:
    prompts = random_prompts(
        isl, [3] * len(isl), vocab_size=500, seed=1, shared_prefix_tokens=prefix
    )
    assert [len(p.token_ids) for p in prompts] == isl
    assert all(10 <= token < 500 for p in prompts for token in p.token_ids)
    shared = min(prefix, *(n - 1 for n in isl))
    assert len({tuple(p.token_ids[:shared]) for p in prompts}) == 1


def test_repeats_differ_behind_their_common_prefix() -> None:
    traffic = Traffic(
        isl=[64], osl=[8], protocol=OfflineBurst(), workload={}, shared_prefix_tokens=16
    )
    one, two = (traffic.prompts(vocab_size=32000, seed=seed)[0].token_ids for seed in (1, 2))
    assert one[:16] == two[:16]
    assert one[16:] != two[16:]
    assert traffic.prompts(vocab_size=32000, seed=1)[0].token_ids == one


def test_a_warm_up_sees_every_length_and_batch_size() -> None:
    traffic = Traffic(
        isl=[100, 1000] * 50, osl=[64] * 100, protocol=ClosedLoop(concurrency=24), workload={}
    )
    needed = warmth_for(traffic, max_batch_size=16)
    alone, *batches, sample = warm_up_rounds(traffic, needed, Warmth())
    assert (alone.concurrency, alone.isl) == (1, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000])
    assert [batch.concurrency for batch in batches] == [1, 2, 4, 8, 16]
    assert all(len(batch.isl) == batch.concurrency for batch in batches)
    assert (sample.concurrency, len(sample.isl), max(sample.osl)) == (16, 32, 32)


def test_behind_one_start_a_warm_up_adds_what_was_not_seen() -> None:
    traffic = Traffic(
        isl=[100, 1000] * 50, osl=[64] * 100, protocol=ClosedLoop(concurrency=24), workload={}
    )
    needed = warmth_for(traffic, max_batch_size=16)
    alone, *batches, _ = warm_up_rounds(traffic, needed, Warmth(prompt_tokens=500, clients=8))
    assert alone.isl == [512, 1000]
    assert [batch.concurrency for batch in batches] == [16]
    (mix,) = warm_up_rounds(traffic, needed, needed.and_more(Warmth(clients=400)))
    assert mix.isl == traffic.isl[:32]


def test_the_mix_of_a_warm_up_ends_after_so_many_prompt_tokens() -> None:
    traffic = Traffic(
        isl=[30_000] * 64, osl=[64] * 64, protocol=ClosedLoop(concurrency=32), workload={}
    )
    *_, mix = warm_up_rounds(traffic, warmth_for(traffic, max_batch_size=32), Warmth())
    assert sum(mix.isl) <= MOST_WARM_UP_TOKENS < sum(traffic.isl[:64])


def test_a_workload_section_says_how_it_is_sent() -> None:
    assert protocol_of({"protocol": "closed_loop", "concurrency": 3}, []) == ClosedLoop(
        concurrency=3
    )
    assert protocol_of({"protocol": "offline"}, []) == OfflineBurst()
    assert protocol_of({"protocol": "open_loop"}, [0.0, 1.0]) == OpenLoop(arrival_s=[0.0, 1.0])
