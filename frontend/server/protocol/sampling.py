"""Fields that chat and text completions share: how tokens are chosen, and vLLM's extras."""

from typing import Any, Literal

import msgspec


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the answer must look like; one of them is given.

    Attributes:
        json: a JSON schema, as object or text.
        json_object: any JSON object.
        regex: a regular expression that the whole answer matches.
        choice: the answer is one of these.
        grammar: a Lark grammar.
    """

    json: dict[str, Any] | bool | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class JsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The wrapper that OpenAI puts around a schema.

    Attributes:
        name: of the schema; not used by the engine.
        schema: the JSON schema.
        description: for people.
        strict: the answer always keeps to the schema, whatever this says.
    """

    name: str
    schema: dict[str, Any] | bool | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's way to ask for structured output.

    Attributes:
        type: "text" asks for nothing.
        json_schema: for type "json_schema".
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a stream carries besides the answer.

    Attributes:
        include_usage: a last chunk tells the token counts.
        continuous_usage_stats: every chunk tells them.
        include_obfuscation: accepted as false only: chunks are never padded.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Meaning and ranges are those of SamplingParams where the names agree; null is the default everywhere.

    Attributes:
        model: one of the names that `/v1/models` lists; null is the one that is served.
        stream: the answer comes bit by bit, as server-sent events.
        stream_options: only with `stream`.
        user, metadata, store, safety_identifier, prompt_cache_key, service_tier: accepted for clients that send them;
            they concern OpenAI's own accounts and change nothing here (store=true is refused).
        cache_salt: only requests with the same salt share cached prompts.
        priority: lower runs first, where the engine's policy is "priority".
        timeout_s: seconds after which the answer ends with finish_reason "timeout".
        request_id: name of the request for logs; `X-Request-Id` is another way to give it.
        response_format, structured_outputs: what the answer must look like; only one of them.
    """

    model: str | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    skip_reading_prefix_cache: bool | None = None
    logits_processors: dict[str, Any] | list[str] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: str | None = None
    priority: int | None = None
    timeout_s: float | None = None
    request_id: str | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
