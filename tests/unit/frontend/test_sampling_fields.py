"""SamplingParams as fields of a body: what the server makes of them is what they were."""

import msgspec
import pytest

from folovllm.common.errors import RequestError
from folovllm.common.sampling_params import SamplingParams
from folovllm.common.structured_outputs import StructuredOutputsParams
from folovllm.frontend.sampling_fields import to_fields
from folovllm.frontend.server.protocol.chat import ChatRequest
from folovllm.frontend.server.sampling import to_sampling_params

PARAMS = [
    SamplingParams(),
    SamplingParams(max_tokens=7, temperature=0.0, top_k=5, top_p=0.5, min_p=0.1, seed=3, n=2),
    SamplingParams(stop=["a", "b"], stop_token_ids=[1], min_tokens=2, ignore_eos=True, include_stop_str_in_output=True),
    SamplingParams(presence_penalty=1.0, frequency_penalty=-1.0, repetition_penalty=1.5, logit_bias={5: 1.5, 7: -2.0}),
    SamplingParams(allowed_token_ids=[1, 2], bad_words=["x"], skip_special_tokens=False, timeout_s=2.5),
    SamplingParams(truncate_prompt_tokens=9, prompt_logprobs=1, logits_processors=["p"]),
    SamplingParams(structured_outputs=StructuredOutputsParams(json={"type": "object"})),
    SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True)),
    SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+")),
    SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a", "b"])),
    SamplingParams(structured_outputs=StructuredOutputsParams(grammar='start: "a"')),
]


@pytest.mark.parametrize("params", PARAMS)
def test_a_server_reads_back_what_was_meant(params: SamplingParams) -> None:
    body = msgspec.json.encode({"messages": [{"role": "user", "content": "a"}], **to_fields(params)})
    read = msgspec.json.decode(body, type=ChatRequest)
    assert to_sampling_params(read, max_tokens=read.max_tokens) == params


def test_defaults_are_not_sent() -> None:
    assert to_fields(SamplingParams()) == {"max_tokens": 16}
    assert to_fields(SamplingParams(max_tokens=None)) == {}
    assert to_fields(SamplingParams(max_tokens=5, temperature=1.0)) == {"max_tokens": 5, "temperature": 1.0}


def test_a_schema_in_text_is_sent_as_an_object() -> None:
    text = to_fields(SamplingParams(structured_outputs=StructuredOutputsParams(json='{"type": "string"}')))
    assert text["response_format"]["json_schema"]["schema"] == {"type": "string"}


@pytest.mark.parametrize("params", [SamplingParams(detokenize=False), SamplingParams(logprobs=1)])
def test_what_no_field_can_say_is_refused(params: SamplingParams) -> None:
    with pytest.raises(RequestError, match="cannot be asked from a server"):
        to_fields(params)
