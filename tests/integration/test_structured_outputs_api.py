"""Structured outputs through all three processes, on a tiny model that knows nothing of what it says."""

import json
import re
from typing import Any

import pytest

from folovllm import LLM, RequestError, SamplingParams, StructuredOutputsParams
from tests.integration.conftest import is_idle
from tests.integration.sampling import PROMPT, run


@pytest.mark.parametrize(
    ("params", "pattern"),
    [
        ({"choice": ["yes", "no", "per chance"]}, "yes|no|per chance"),
        ({"regex": "[a-f]{3}-[0-9]+!"}, "[a-f]{3}-[0-9]+!"),
        ({"grammar": 'start: "x" digit+ "y"\ndigit: /[0-4]/'}, "x[0-4]+y"),
    ],
)
def test_structured_outputs_hold_at_any_temperature(qwen3_llm: LLM, params: dict[str, Any], pattern: str) -> None:
    settings = SamplingParams(
        temperature=1.0, seed=1, n=6, max_tokens=60, structured_outputs=StructuredOutputsParams(**params)
    )
    (output,) = run(qwen3_llm, PROMPT, settings)
    for answer in output.outputs:
        if answer.finish_reason == "stop":
            assert re.fullmatch(pattern, answer.text)
        assert answer.finish_reason in ("stop", "length")
    assert any(answer.finish_reason == "stop" for answer in output.outputs)


def test_a_json_schema_holds(qwen3_llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    structure = StructuredOutputsParams(json=schema)
    bias = dict.fromkeys((9, 10, 13, 32), -100.0)  # blanks would go on for ever, with a model that knows nothing
    params = SamplingParams(temperature=1.0, seed=2, n=4, max_tokens=60, structured_outputs=structure, logit_bias=bias)
    (output,) = run(qwen3_llm, PROMPT, params)
    for answer in output.outputs:
        assert answer.finish_reason == "stop", answer.text
        assert set(json.loads(answer.text)) == {"ok", "kind"}


@pytest.mark.parametrize(
    "params", [{"json": {"type": "not-a-type"}}, {"regex": "(a"}, {"grammar": "start: nothing_there"}]
)
def test_L28_what_cannot_be_enforced_is_refused_with_the_cause(qwen3_llm: LLM, params: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        run(qwen3_llm, PROMPT, SamplingParams(structured_outputs=StructuredOutputsParams(**params)))
    assert caught.value.field == "structured_outputs"
    assert len(str(caught.value)) > 20
    assert is_idle(qwen3_llm)
