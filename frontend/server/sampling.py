"""Fields of a body → SamplingParams. Ranges are checked there; here is what only the HTTP API has."""

from collections.abc import Mapping
from typing import Any

from folovllm.common.errors import RequestError
from folovllm.common.sampling_params import SamplingParams
from folovllm.common.structured_outputs import StructuredOutputsParams
from folovllm.frontend.server.protocol.sampling import ResponseFormat, SamplingFields

MAX_TOP_LOGPROBS = 20  # OpenAI's bound for chats; a stream of more is slower to write than to compute

_SAME_NAME = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "min_tokens", "ignore_eos"),
    *("include_stop_str_in_output", "skip_special_tokens", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "allowed_token_ids", "bad_words", "prompt_logprobs", "truncate_prompt_tokens"),
    *("timeout_s", "skip_reading_prefix_cache", "logits_processors"),
)


def to_sampling_params(body: SamplingFields, *, max_tokens: int | None, **given: Any) -> SamplingParams:
    """The parameters of a body's answers.

    Args:
        body: of either completions endpoint.
        max_tokens: None: as many as the model's length allows.
        given: what else the endpoint itself decides; None leaves a default.

    Raises:
        RequestError: names the field at fault.
    """
    _check_options(body)
    values = {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    values |= {name: value for name, value in given.items() if value is not None}
    if body.logit_bias is not None:
        values["logit_bias"] = _biases(body.logit_bias)
    asked = structured_outputs(body)
    if asked is not None and "structured_outputs" in values:
        raise RequestError("tool_choice and structured outputs do not go together", "tool_choice")
    if asked is not None:
        values["structured_outputs"] = asked
    return SamplingParams(max_tokens=max_tokens, **values)


def refuse_stream(body: SamplingFields) -> None:
    """For what answers whole only. Raises RequestError."""
    if body.stream:
        raise RequestError("stream=true is not possible here: the answer comes whole", "stream")


def _check_options(body: SamplingFields) -> None:
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream=true", "stream_options")
    if body.stream_options is not None and body.stream_options.include_obfuscation:
        raise RequestError("chunks are never padded", "stream_options.include_obfuscation")
    if body.store:
        raise RequestError("answers are not stored here; leave store at false", "store")


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    """JSON has no other keys than texts."""
    try:
        return {int(token_id): bias for token_id, bias in given.items()}
    except ValueError as error:
        wrong = next(key for key in given if not key.strip().removeprefix("-").isdecimal())
        raise RequestError(f"logit_bias has the key {wrong[:80]!r}, which is no token id", "logit_bias") from error


def structured_outputs(body: SamplingFields) -> StructuredOutputsParams | None:
    """What the answer must look like, from whichever field says so. Raises RequestError."""
    wanted = body.structured_outputs
    format_ = None if body.response_format is None else _of_response_format(body.response_format)
    if wanted is None:
        return format_
    if format_ is not None:
        raise RequestError("give either response_format or structured_outputs", "response_format")
    schema = wanted.json
    if isinstance(schema, bool):
        schema = "true" if schema else "false"
    return StructuredOutputsParams(
        json=schema,
        json_object=wanted.json_object,
        regex=wanted.regex,
        choice=wanted.choice,
        grammar=wanted.grammar,
    )


def _of_response_format(format_: ResponseFormat) -> StructuredOutputsParams | None:
    if format_.type != "json_schema":
        if format_.json_schema is not None:
            raise RequestError(f"type {format_.type!r} takes no schema", "response_format.json_schema")
        return StructuredOutputsParams(json_object=True) if format_.type == "json_object" else None
    if format_.json_schema is None or format_.json_schema.schema is None:
        raise RequestError(
            'type "json_schema" needs json_schema={"name": …, "schema": {…}}', "response_format.json_schema.schema"
        )
    schema = format_.json_schema.schema
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return StructuredOutputsParams(json=schema)
