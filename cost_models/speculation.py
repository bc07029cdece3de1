"""Speculative decoding: what drafting and verifying add to a step, and what a step then yields.

A step verifies the drafts of all sequences beside their own tokens, and the draft model makes the
next ones: one pass over everything that the target has seen, and one more for each further token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models.acceptance import Acceptance
from cost_models.calibration import Calibration
from cost_models.draft import ON_HIDDEN_STATES, Draft, draft_of
from cost_models.engine import EngineConfig
from cost_models.engine_traits import EngineTraits
from cost_models.gpu import GpuSpec
from cost_models.model import ModelSpec
from cost_models.step import StepBatch, StepCost, StepModel

FloatArray = NDArray[np.float64]

SYNCHRONOUS = frozenset({"NGram", "DraftTarget", "Medusa"})
"""Schemes whose steps are not scheduled ahead: the next one waits for drafts from the host.

vLLM 0.25: `VllmConfig` turns asynchronous scheduling off for all but EAGLE and MTP. TensorRT-LLM
1.2: its guide runs them with `disable_overlap_scheduler`.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """One scheme on one text: how much is drafted, and how much of it is right."""

    decoding_type: str
    max_draft_len: int
    acceptance: Acceptance
    draft: Draft | None
    """None where nothing but the text drafts."""
    pads_drafts: bool
    """Whether sequences without a full draft verify padding, as captured graphs ask for it."""

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens that one step yields for a sequence."""
        return self.acceptance.tokens_per_step(self.max_draft_len)

    @property
    def rows_per_sequence(self) -> float:
        """Mean tokens of a sequence that one step computes."""
        if self.pads_drafts:
            return 1.0 + self.max_draft_len
        return 1.0 + self.acceptance.verified(self.max_draft_len)

    @property
    def uniform_rate(self) -> float:
        """Chance that a sequence has a full draft, as captured decode graphs ask for."""
        full = self.acceptance.verified(self.max_draft_len) / self.max_draft_len
        return 1.0 if self.pads_drafts else full

    @property
    def is_synchronous(self) -> bool:
        """Whether a step is scheduled only when the one before it is done."""
        return self.decoding_type in SYNCHRONOUS


def speculation_of(
    config: EngineConfig,
    *,
    model: ModelSpec,
    engine: EngineTraits,
    acceptance: Acceptance,
    draft_model: ModelSpec | None,
) -> Speculation:
    """Return the speculation of a configuration that has one.

    Args:
        config: What is deployed.
        model: The target.
        engine: Whether its sequences verify padding.
        acceptance: How often drafts are right.
        draft_model: The model that `speculative_model` names; other schemes derive theirs.
    """
    return Speculation(
        decoding_type=config.decoding_type,
        max_draft_len=config.max_draft_len,
        acceptance=acceptance,
        draft=draft_of(config, model, draft_model),
        pads_drafts=engine.pads_drafts,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpeculativeStep:
    """Step costs under speculation, per token that a sequence gains.

    One iteration of cost C gives each decoding sequence E tokens on average. Whoever counts in
    steps of one token sees decode steps of C/E, and in place of an iteration with prompts beside
    one step of C_mixed − (E − 1)/E · C_decode, so that E tokens cost what the iteration does.
    """

    verify: StepModel
    """The target over the rows that it verifies."""
    draft: StepModel | None
    """A pass of the model that drafts; None where none does."""
    speculation: Speculation

    @property
    def model(self) -> ModelSpec:
        """The target."""
        return self.verify.model

    @property
    def config(self) -> EngineConfig:
        """What is deployed."""
        return self.verify.config

    @property
    def rows_per_sequence(self) -> float:
        """Tokens of a decoding sequence in one iteration."""
        return self.verify.rows_per_sequence

    def iteration(self, batch: StepBatch) -> StepCost:
        """Return the time of one iteration of the engine, by family."""
        families = dict(self.verify.cost(batch).by_family)
        families["draft"] = self.draft_s(batch)
        families["lm_head"] = families["lm_head"] + self.judging_s(batch.decode_sequences)
        families["host"] = families["host"] + self.bare_host_s(batch.running)
        return StepCost(by_family=families)

    def cost(self, batch: StepBatch) -> StepCost:
        """Return the time of a step of one token, by family."""
        tokens = self.speculation.tokens_per_step
        whole, decode = self.iteration(batch), self.iteration(batch.decode_only)
        decodes = np.asarray(batch.decode_sequences) > 0
        spared = np.where(decodes, (tokens - 1) / tokens, 0.0)
        return StepCost(
            by_family={
                name: seconds - spared * decode.by_family[name]
                for name, seconds in whole.by_family.items()
            }
        )

    def seconds(self, batch: StepBatch) -> FloatArray:
        """Return the time of a step of one token."""
        return self.cost(batch).seconds

    def draft_s(self, batch: StepBatch) -> FloatArray:
        """Return the time to draft the next tokens of every sequence in a batch."""
        running = batch.running
        if self.draft is None:
            return self.heads_s(running) + self.search_s(running * _mean_kv_len(batch))
        rows = self.draft.rows_per_sequence * np.asarray(batch.decode_sequences, np.float64)
        seen = rows + np.asarray(batch.prefill_tokens, np.float64)
        further = StepBatch(decode_sequences=running, decode_kv_len=_mean_kv_len(batch))
        first_s = self.draft.seconds(batch) + self.joining_s(seen)
        further_s = self.further_pass.seconds(further) + self.joining_s(running)
        return first_s + (self.speculation.max_draft_len - 1) * further_s

    @property
    def further_pass(self) -> StepModel:
        """The draft over the one token of each sequence that it drafted last.

        Raises:
            ValueError: No model drafts.
        """
        if self.draft is None:
            raise ValueError(f"no model drafts for {self.speculation.decoding_type}")
        return replace(self.draft, rows_per_sequence=1.0)

    def joining_s(self, tokens: FloatArray) -> FloatArray:
        """Return the time to bring the target's states and the embeddings of tokens together."""
        if self.speculation.decoding_type not in ON_HIDDEN_STATES:
            return np.zeros(np.shape(tokens))
        hidden = self.model.hidden_size
        return self.verify.gemm(tokens, hidden, 2 * hidden, dtype="bfloat16")

    def heads_s(self, sequences: FloatArray) -> FloatArray:
        """Return the time of Medusa's heads (Cai et al. 2024, arXiv:2401.10774); 0 of others.

        For each token drafted, a residual block and a matrix over the vocabulary.
        """
        if self.speculation.decoding_type != "Medusa":
            return np.zeros(np.shape(sequences))
        hidden, tp = self.model.hidden_size, self.config.attention_tensor_parallel_size
        vocab_shard = -(-self.model.vocab_size // tp)
        block_s = self.verify.gemm(sequences, hidden, hidden, dtype="bfloat16")
        head_s = self.verify.gemm(sequences, vocab_shard, hidden, dtype="bfloat16")
        return self.speculation.max_draft_len * (block_s + head_s)

    def search_s(self, cached_tokens: ArrayLike) -> FloatArray:
        """Return the host time to look for n-grams in so many tokens; 0 of other schemes."""
        searches = self.speculation.decoding_type == "NGram"
        token_s = self.verify.calibration.step.ngram_token_s if searches else 0.0
        return token_s * np.asarray(cached_tokens, np.float64)

    def judging_s(self, decode_sequences: ArrayLike) -> FloatArray:
        """Return the time to compare drafts with the logits of their rows, over the vocabulary."""
        step, gpu = self.verify.calibration.step, self.verify.gpu
        drafted = (self.rows_per_sequence - 1) * np.asarray(decode_sequences, np.float64)
        read_bytes = drafted * self.model.vocab_size * step.judged_logit_bytes
        return np.asarray(read_bytes / (gpu.hbm_bytes_per_s * step.elementwise_efficiency))

    def bare_host_s(self, running: FloatArray) -> FloatArray:
        """Return the host time that a scheme leaves bare which is not scheduled ahead."""
        step = self.verify.calibration.step
        bare_s = step.synchronous_host_s + step.synchronous_host_per_sequence_s * running
        return bare_s if self.speculation.is_synchronous else np.zeros(np.shape(running))

    def launch_floor_s(self, sequences: ArrayLike, prefill_tokens: ArrayLike) -> FloatArray:
        """Return the host time to launch the target's kernels."""
        return self.verify.launch_floor_s(sequences, prefill_tokens)

    def launch_s(self, gpu_s: float, floor_s: float) -> float:
        """Return what launching its kernels adds to the GPU time of a step."""
        return self.verify.launch_s(gpu_s, floor_s)


AnyStep = StepModel | SpeculativeStep
"""What prices the steps of an engine, with speculation or without."""


def speculative_step(
    speculation: Speculation,
    *,
    model: ModelSpec,
    config: EngineConfig,
    gpu: GpuSpec,
    calibration: Calibration,
) -> SpeculativeStep:
    """Return the step costs of a target under speculation."""
    if speculation.is_synchronous:
        # The host's work is bare here (`SpeculativeStep.bare_host_s`): nothing hides it.
        bare = replace(calibration.step, host_floor_s=0.0, host_floor_per_sequence_s=0.0)
        calibration = replace(calibration, step=bare)
    verify = StepModel(
        model=model,
        config=config,
        gpu=gpu,
        calibration=calibration,
        rows_per_sequence=speculation.rows_per_sequence,
        uniform_rate=speculation.uniform_rate,
    )
    draft = speculation.draft
    if draft is not None and draft.num_heads:
        draft = None
    return SpeculativeStep(
        verify=verify,
        draft=_draft_step(draft, verify) if draft else None,
        speculation=speculation,
    )


def _draft_step(draft: Draft, verify: StepModel) -> StepModel:
    """A pass of the draft: nothing is scheduled anew.

    EAGLE and MTP draft inside the target's graph, or in vLLM in one of their own. A draft model
    sees one token more than the target, the one that the target added, and vLLM launches it layer
    by layer.
    """
    calibration, config = verify.calibration, draft.config
    has_own_model = draft.decoding_type == "DraftTarget"
    if has_own_model and calibration.step.draft_layer_s:
        config = replace(config, cuda_graph_max_batch_size=0)
    step = replace(
        calibration.step,
        host_s=calibration.step.draft_pass_s
        if has_own_model
        else calibration.step.drafting_layer_pass_s,
        host_per_sequence_s=0.0,
        host_floor_s=0.0,
        host_floor_per_sequence_s=0.0,
        eager_layer_s=calibration.step.draft_layer_s if has_own_model else 0.0,
        eager_layer_tp_s=0.0,
        eager_layer_fp8_cache_s=0.0,
        eager_sequence_s=0.0,
        piecewise_max_tokens=0,
    )
    return StepModel(
        model=draft.model,
        config=config,
        gpu=verify.gpu,
        calibration=replace(calibration, step=step),
        rows_per_sequence=verify.rows_per_sequence + has_own_model,
    )


def _mean_kv_len(batch: StepBatch) -> FloatArray:
    """Cached tokens of a sequence behind a step, prompts included."""
    columns = (
        batch.decode_sequences, batch.decode_kv_len, batch.prefill_sequences, batch.prefill_past,
        batch.prefill_tokens,
    )  # fmt: skip
    decoding, kv_len, prompts, past, tokens = (np.asarray(c, np.float64) for c in columns)
    cached = decoding * kv_len + prompts * past + tokens
    return np.asarray(cached / np.maximum(decoding + prompts, 1e-9))
