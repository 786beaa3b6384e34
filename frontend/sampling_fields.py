"""SamplingParams → the fields of a body of OpenAI's API, with vLLM's names for what OpenAI does not have.

The way back is `server/sampling.py`.
"""

from typing import Any

import msgspec

from folovllm.common.errors import RequestError
from folovllm.common.sampling_params import SamplingParams

_NOT_IN_BODIES = ("detokenize", "logprobs", "structured_outputs")


def to_fields(params: SamplingParams) -> dict[str, Any]:
    """What differs from the defaults, so that a server that lacks an extra is not sent it without need.

    Raises:
        RequestError: a parameter has no field of the same meaning.
    """
    for name, default in (("detokenize", True), ("logprobs", None)):
        if getattr(params, name) != default:
            raise RequestError(f"{name} cannot be asked from a server in this way", name)
    fields = {
        field.name: value
        for field in msgspec.structs.fields(params)
        if field.name not in _NOT_IN_BODIES and (value := getattr(params, field.name)) not in (None, field.default)
    }
    if params.max_tokens is not None:
        fields["max_tokens"] = params.max_tokens  # servers have other defaults
    if params.logit_bias is not None:
        fields["logit_bias"] = {str(token_id): bias for token_id, bias in params.logit_bias.items()}
    return fields | _structure(params)


def _structure(params: SamplingParams) -> dict[str, Any]:
    wanted = params.structured_outputs
    if wanted is None:
        return {}
    if wanted.json is not None:
        schema = msgspec.json.decode(wanted.json) if isinstance(wanted.json, str) else wanted.json
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}
    if wanted.json_object:
        return {"response_format": {"type": "json_object"}}
    given = {"regex": wanted.regex, "choice": wanted.choice, "grammar": wanted.grammar}
    return {"structured_outputs": {name: value for name, value in given.items() if value is not None}}
