"""`/inspector/state`."""

import msgspec


class EngineFacts(msgspec.Struct, kw_only=True):
    """What does not change while the engine runs."""

    model: str
    device: str
    dtype: str
    version: str
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


class InspectedRequest(msgspec.Struct, kw_only=True):
    """How far one answer is, as in the message RequestSnapshot."""

    client: int
    number: int
    status: str
    priority: int
    num_prompt_tokens: int
    num_known_tokens: int
    num_computed_tokens: int
    num_cached_tokens: int
    max_tokens: int
    num_preemptions: int
    age_s: float


class InspectedStep(msgspec.Struct, kw_only=True):
    """What one step computes, as in the message StepSnapshot."""

    step_id: int
    num_decode_tokens: int
    num_prefill_tokens: int
    age_s: float


class InspectorState(msgspec.Struct, kw_only=True):
    """The engine from inside.

    Attributes:
        engine: what does not change.
        stats: the fields of the message EngineStats.
        requests: those that run, then those that wait, in order; only the first ones.
        steps: the last ones, oldest first.
        blocks: a digit for each block, or for each `block_stride`-th: 0 free and empty, 1 free with contents that can
            be found, 2 in use, 3 shared.
        block_stride: 1, or more where there are many blocks.
    """

    engine: EngineFacts
    stats: dict[str, int | bool]
    requests: list[InspectedRequest]
    steps: list[InspectedStep]
    blocks: str
    block_stride: int
