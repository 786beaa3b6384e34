"""Core ↔ worker: one SchedulerOutput for each step one way, one ModelRunnerOutput the other way.

Arrays travel as little-endian int32 bytes (`numpy.frombuffer(field, "<i4")`). Steps are executed in the order they are
sent; up to `pipeline_depth` are in flight. Slots are rows of the worker's persistent state.
"""

import msgspec

from folovllm.common.messages.lifecycle import BadFrame, ConfigureWorker, Failed, Hello, WorkerReady


class SamplingRow(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, frozen=True):
    """What the worker must know to sample one request: resolved numbers, no text.

    Attributes:
        temperature: ≥ 0; 0 is greedy.
        top_k: ≥ 1, or 0 for all tokens.
        top_p: in (0, 1].
        min_p: in [0, 1].
        seed: 64-bit seed of the request; always set (the frontend draws one where the user gave none).
        sample_index: which of the request's `n` answers this is; part of the hash that draws its tokens.
        min_tokens: the stop set is masked before this many output tokens.
        stop_token_ids: int32 bytes; the whole stop set (end-of-sequence ids and stop_token_ids), resolved once.
        presence_penalty: in [-2, 2]; taken off the logit of every token that the output holds.
        frequency_penalty: in [-2, 2]; taken off as often as the output holds the token.
        repetition_penalty: > 0; divides positive, multiplies negative logits of tokens in prompt or output.
        bias_token_ids: int32 bytes; tokens whose logits are changed, each at most once.
        bias_values: float32 bytes, parallel to `bias_token_ids`; what is added.
        allowed_token_ids: int32 bytes; only these may be sampled; empty allows all.
        bad_words: int32 bytes each; token sequences of at least one token that must not appear in the output.
        logprobs: how many of the most likely tokens are reported with each sampled one, which is always reported:
            None reports nothing, 0 the sampled token alone, -1 the whole vocabulary.
        prompt_logprobs: the same for each prompt token but the first.
        logits_processors: (name, argument as JSON) of processors loaded at the engine's start, in order.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    sample_index: int = 0
    min_tokens: int = 0
    stop_token_ids: bytes = b""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias_token_ids: bytes = b""
    bias_values: bytes = b""
    allowed_token_ids: bytes = b""
    bad_words: list[bytes] = []
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logits_processors: list[tuple[str, str]] = []


class NewRequest(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, frozen=True):
    """A request that takes a slot in this step: a new one, a fork, or one that comes back after preemption.

    Attributes:
        slot: row of the worker's persistent state; whatever was there is overwritten.
        token_ids: int32 bytes; every known token, the prompt and (after preemption) what was generated.
        num_prompt_tokens: how many of them are the prompt; the rest are output, so that sampling goes on where it was.
        num_computed_tokens: tokens whose K and V are in the cache already (shared blocks).
        block_ids: int32 bytes; the KV blocks in order.
        sampling: how to sample.
    """

    slot: int
    token_ids: bytes
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: bytes
    sampling: SamplingRow


class SchedulerOutput(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, frozen=True, tag="step"):
    """Core → worker: one step.

    A slot samples one token if the step computes the last token known for it; the sampled token is then known to the
    worker (it is the slot's next input) and nothing more is sent for it. The worker applies, in this order:
    new_requests, appended blocks, block_copies, then computes.

    Attributes:
        step_id: counts up by one; echoed by ModelRunnerOutput.
        slots: int32 bytes; slots scheduled: first those with one token, then those with more.
        num_scheduled_tokens: int32 bytes; token counts (> 1) of the last `len / 4` slots; all before them have one.
        new_requests: slots filled anew in this step.
        append_slots: int32 bytes; slots that get one more KV block each (a slot may occur several times).
        append_block_ids: int32 bytes; the block for each of `append_slots`, put at the end of the slot's block table.
        block_copies: int32 bytes; pairs (source block, destination block) copied before the step's first write.
        masked_slots: int32 bytes; slots of this step that sample under a grammar.
        token_masks: for each of `masked_slots`, ceil(num_valid_token_ids / 32) little-endian uint32 words; bit i of
            word w allows token 32 · w + i.
    """

    step_id: int
    slots: bytes
    num_scheduled_tokens: bytes = b""
    new_requests: list[NewRequest] = []
    append_slots: bytes = b""
    append_block_ids: bytes = b""
    block_copies: bytes = b""
    masked_slots: bytes = b""
    token_masks: bytes = b""


class Logprobs(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, frozen=True):
    """Log probabilities for a number of places, of the network's own distribution: no penalty, bias, mask, temperature.

    Each place has one chosen token (sampled, or the prompt's) and, after it, its most likely tokens in falling order,
    ties by lowest id; the chosen one may occur among these again.

    Attributes:
        counts: int32 bytes; how many entries each place has, the chosen token's included; ≥ 1.
        token_ids: int32 bytes; the entries' tokens, place after place.
        values: float32 bytes, parallel to `token_ids`; natural logarithms.
        ranks: int32 bytes; for each place, how many tokens are at least as likely as the chosen one, itself included.
    """

    counts: bytes
    token_ids: bytes
    values: bytes
    ranks: bytes


class PromptLogprobs(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """Log probabilities of consecutive prompt tokens of one request.

    Attributes:
        row: index into the step's `slots`.
        start: position in the prompt of the first token reported, ≥ 1. Token `start` is predicted by `start` - 1.
        logprobs: one place for each token.
    """

    row: int
    start: int
    logprobs: Logprobs


class ModelRunnerOutput(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, frozen=True, tag="tokens"):
    """Worker → core: the result of one step.

    Attributes:
        step_id: the step's.
        token_ids: int32 bytes; one sampled token for each slot that sampled, in the order of `slots`.
        no_token_rows: int32 bytes; indices into `token_ids` where no token could be chosen: constraints left none, a
            logits processor failed, or the network's numbers overflowed (the token there is void).
        error: "" or what went wrong; then `token_ids` is empty and the requests of the step are failed by the core.
        logprob_rows: int32 bytes; indices into `token_ids`, rising: tokens that are reported with log probabilities.
        logprobs: one place for each of `logprob_rows`; None if there is none.
        prompt_logprobs: of the requests that ask for them and computed prompt tokens in this step.
        max_num_tokens: most tokens that later steps should have, since the device's memory did not suffice for more;
            0 says nothing.
    """

    step_id: int
    token_ids: bytes = b""
    no_token_rows: bytes = b""
    error: str = ""
    logprob_rows: bytes = b""
    logprobs: Logprobs | None = None
    prompt_logprobs: list[PromptLogprobs] = []
    max_num_tokens: int = 0


CoreToWorker = ConfigureWorker | SchedulerOutput | BadFrame
WorkerToCore = Hello | WorkerReady | Failed | ModelRunnerOutput | BadFrame
