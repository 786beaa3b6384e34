"""Frontend ↔ core: requests one way, tokens and ends the other way.

A frontend names its requests by numbers of its own (0 ≤ number < 2**31), unique among its live requests; a request
with `n` answers takes `n` consecutive numbers. The core keeps the frontends' numbers apart, so two frontends may use
the same.
"""

from typing import Literal

import msgspec

from folovllm.common.messages.core_worker import Logprobs, SamplingRow
from folovllm.common.messages.lifecycle import BadFrame, Hello

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]
RejectKind = Literal["invalid", "queue_full", "draining"]
GrammarKind = Literal["json", "json_object", "regex", "choice", "lark"]


class Grammar(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """What an answer must look like.

    Attributes:
        kind: how `text` is to be read.
        text: a JSON schema, nothing (json_object: any JSON object), a regular expression, a JSON list of strings
            (choice), or a Lark grammar.
    """

    kind: GrammarKind
    text: str


class EngineCoreRequest(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, frozen=True):
    """One prompt to be answered `n` times.

    Attributes:
        number: the frontend's number of the first answer; answer i has `number + i`.
        request_id: the user's name for it, for logs only; need not be unique.
        prompt_token_ids: int32 bytes, at least one token.
        sampling: `sample_index` is 0 here; the core sets it for each answer.
        max_tokens: most output tokens of each answer.
        n: number of answers.
        priority: lower runs first where the policy is "priority".
        stream: True: every token is reported in the step that made it; False: once, at the end. Log probabilities are
            only reported to streaming requests.
        timeout_s: seconds from receipt after which the answers end with reason "timeout"; None sets no bound.
        grammar: None, or what each answer must look like.
        cache_salt: only requests with the same salt share cached blocks.
        skip_reading_prefix_cache: compute the whole prompt, whatever the cache has of it.
    """

    number: int
    request_id: str
    prompt_token_ids: bytes
    sampling: SamplingRow
    max_tokens: int
    n: int = 1
    priority: int = 0
    stream: bool = False
    timeout_s: float | None = None
    grammar: Grammar | None = None
    cache_salt: str = ""
    skip_reading_prefix_cache: bool = False


class AddRequests(msgspec.Struct, array_like=True, gc=False, frozen=True, tag="add"):
    """Frontend → core: new requests, admitted or refused one by one.

    Attributes:
        requests: in the order in which they arrive in the queue.
    """

    requests: list[EngineCoreRequest]


class AbortRequests(msgspec.Struct, array_like=True, gc=False, frozen=True, tag="abort"):
    """Frontend → core: forget these requests.

    No output for a number is sent after the core has read this; the frontend drops what is still on its way.

    Attributes:
        numbers: int32 bytes; the answers' numbers. Those that are not live are passed over.
    """

    numbers: bytes


class GetStats(msgspec.Struct, array_like=True, gc=False, frozen=True, tag="get-stats"):
    """Frontend → core: asks for EngineStats; also serves as a health check (a round trip).

    Attributes:
        ticket: any number; echoed, so that an answer is matched to its question.
    """

    ticket: int


class ResetPrefixCache(msgspec.Struct, array_like=True, gc=False, frozen=True, tag="reset-prefix-cache"):
    """Frontend → core: forget what is cached; blocks in use by running requests stay, but are found no more.

    Attributes:
        ticket: any number; echoed by the EngineStats that answer.
    """

    ticket: int


class GetSnapshot(msgspec.Struct, array_like=True, gc=False, frozen=True, tag="get-snapshot"):
    """Frontend → core: asks for an EngineSnapshot.

    Attributes:
        ticket: any number; echoed, so that an answer is matched to its question.
    """

    ticket: int


class Welcome(msgspec.Struct, array_like=True, frozen=True, tag="welcome"):
    """Core → frontend: the answer to its Hello.

    Attributes:
        model: folder of the model, as given to the core.
        max_model_len: longest prompt + output in tokens.
        num_valid_token_ids: token ids allowed in prompts are below this.
        block_size: tokens in one KV block.
        num_blocks: usable KV blocks (block 0 not counted).
        max_num_seqs: requests running at once.
        device: the worker's device in words.
        dtype: type of weights and KV cache.
        version: FoloVLLM's version in the core.
    """

    model: str
    max_model_len: int
    num_valid_token_ids: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    device: str
    dtype: str
    version: str


class FinishedRequest(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, frozen=True):
    """The end of one answer.

    Attributes:
        number: the frontend's number of the answer.
        finish_reason: why it ended.
        stop_token_id: the token of the stop set that ended it (part of the output), None if none did.
        token_ids: int32 bytes; the whole output if the request does not stream, else empty.
        num_cached_tokens: prompt tokens that were taken from shared blocks instead of being computed.
        num_preemptions: how often it was preempted.
        queue_s: seconds from the core's receipt to the first schedule.
        first_token_s: seconds from the core's receipt to the first token; 0 if there was none.
        total_s: seconds from the core's receipt to the end.
        error: text for finish_reason "error".
    """

    number: int
    finish_reason: FinishReason
    stop_token_id: int | None = None
    token_ids: bytes = b""
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    queue_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0
    error: str = ""


class RejectedRequest(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, frozen=True):
    """A request that was refused; none of its `n` answers will come.

    Attributes:
        number: the request's, that of its first answer.
        kind: "invalid" can never run, "queue_full" may be tried again, "draining" must go to another engine.
        message: why, with the figures; for people.
        field: for "invalid", the field of EngineCoreRequest or SamplingRow at fault.
        retry_after_s: for "queue_full", seconds after which another try is likely to succeed.
    """

    number: int
    kind: RejectKind
    message: str
    field: str = ""
    retry_after_s: float = 0.0


class RequestPromptLogprobs(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """Log probabilities of consecutive prompt tokens; of a request with `n` answers only the first reports them.

    Attributes:
        number: the request's, that of its first answer.
        start: position in the prompt of the first token reported, ≥ 1.
        logprobs: one place for each token.
    """

    number: int
    start: int
    logprobs: Logprobs


class EngineCoreOutputs(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, frozen=True, tag="outputs"):
    """Core → frontend: what one step brought for this frontend.

    Attributes:
        numbers: int32 bytes; for each new token of a streaming request, the request's number.
        token_ids: int32 bytes; the tokens, parallel to `numbers`; in order for each request.
        finished: answers that ended; their last tokens are in `token_ids` (streaming) or in the entry itself.
        rejected: requests that were refused.
        logprob_rows: int32 bytes; indices into `token_ids`, rising: tokens that come with log probabilities.
        logprobs: one place for each of `logprob_rows`; None if there is none.
        prompt_logprobs: parts of prompts, in order for each request; complete before its first token.
    """

    numbers: bytes = b""
    token_ids: bytes = b""
    finished: list[FinishedRequest] = []
    rejected: list[RejectedRequest] = []
    logprob_rows: bytes = b""
    logprobs: Logprobs | None = None
    prompt_logprobs: list[RequestPromptLogprobs] = []


class EngineStats(msgspec.Struct, array_like=True, gc=False, frozen=True, tag="stats"):
    """Core → frontend: the engine's state now.

    Attributes:
        ticket: echoed from GetStats.
        num_running: requests that hold a slot.
        num_waiting: requests in the queue.
        num_free_blocks: KV blocks that are free.
        num_blocks: usable KV blocks.
        num_cached_tokens_total: prompt tokens taken from shared blocks since start.
        num_preemptions_total: preemptions since start.
        num_lost_tokens_total: tokens computed and thrown away by preemption since start.
        num_prompt_tokens_total: prompt tokens of all admitted answers since start.
        num_output_tokens_total: tokens generated since start.
        num_frontends: frontends connected.
        num_steps_total: steps submitted since start.
        tokens_in_use: tokens whose K and V are held in blocks now.
        num_cache_queries_total: prompt tokens that were looked up in the prefix cache since start.
        num_cache_hits_total: of these, tokens that were found.
        num_cached_blocks: blocks whose contents can be found, in use or free.
        num_evicted_blocks_total: cached blocks that were given to somebody else since start.
        num_worker_restarts_total: workers that were started in place of one that had ended.
        is_recovering: there is no worker at the moment: the next one is being started.
    """

    ticket: int
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    num_cached_tokens_total: int
    num_preemptions_total: int
    num_lost_tokens_total: int
    num_prompt_tokens_total: int
    num_output_tokens_total: int
    num_frontends: int
    num_steps_total: int
    tokens_in_use: int
    num_cache_queries_total: int = 0
    num_cache_hits_total: int = 0
    num_cached_blocks: int = 0
    num_evicted_blocks_total: int = 0
    num_worker_restarts_total: int = 0
    is_recovering: bool = False


class RequestSnapshot(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """How far one answer is, in numbers. The words are those of the glossary in `core_proc/request.py`.

    Attributes:
        client: the frontend it came from, a number of the core's.
        number: the frontend's number of the answer.
        status: where it is.
        priority: lower runs first where the policy is "priority".
        num_prompt_tokens: tokens of its prompt.
        num_known_tokens: prompt and output, tokens on their way included.
        num_computed_tokens: of these, those whose K and V are held; 0 while it waits.
        num_cached_tokens: prompt tokens that were taken from shared blocks.
        max_tokens: most output tokens.
        num_preemptions: how often it was preempted.
        age_s: seconds since the core received it.
    """

    client: int
    number: int
    status: Literal["waiting", "running", "preempted"]
    priority: int
    num_prompt_tokens: int
    num_known_tokens: int
    num_computed_tokens: int
    num_cached_tokens: int
    max_tokens: int
    num_preemptions: int
    age_s: float


class StepSnapshot(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """What one step computes.

    Attributes:
        step_id: counts up.
        num_decode_tokens: requests that get one token computed.
        num_prefill_tokens: tokens of all others: prompts, and what was lost by preemption.
        age_s: seconds since it was submitted.
    """

    step_id: int
    num_decode_tokens: int
    num_prefill_tokens: int
    age_s: float


class EngineSnapshot(msgspec.Struct, array_like=True, gc=False, frozen=True, tag="snapshot"):
    """Core → frontend: the engine from inside, in numbers and bounded in size; no token and no name is in it.

    Attributes:
        ticket: echoed from GetSnapshot.
        stats: the engine's state; its `ticket` is the same.
        max_num_batched_tokens: the token budget of a step.
        requests: those that run, then those that wait, in the order in which they will be served; only the first ones.
        steps: the last ones, oldest first.
        blocks: one byte for each block, or for each `block_stride`-th, from block 1 on: 0 free and empty, 1 free with
            contents that can be found, 2 in use by one request, 3 shared by several.
        block_stride: 1, or more where there are many blocks.
    """

    ticket: int
    stats: EngineStats
    max_num_batched_tokens: int
    requests: list[RequestSnapshot]
    steps: list[StepSnapshot]
    blocks: bytes
    block_stride: int


class Ping(msgspec.Struct, array_like=True, gc=False, frozen=True, tag="ping"):
    """Core → frontend: nothing to say; its delivery tells the core that the frontend is still connected."""


class EngineFailed(msgspec.Struct, array_like=True, gc=False, frozen=True, tag="engine-failed"):
    """Core → frontend: the engine ends.

    Attributes:
        message: why; for people.
    """

    message: str


FrontendToCore = Hello | AddRequests | AbortRequests | GetStats | GetSnapshot | ResetPrefixCache | BadFrame
CoreToFrontend = Welcome | EngineCoreOutputs | EngineStats | EngineSnapshot | Ping | EngineFailed | BadFrame
