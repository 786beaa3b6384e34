"""What is accepted, what is refused and how it is named, and what everything is resolved to."""

import random
from typing import Any

import pytest

from folovllm.common.errors import RequestError
from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.messages.frontend_core import Grammar
from folovllm.common.sampling_params import SamplingParams
from folovllm.common.structured_outputs import StructuredOutputsParams
from folovllm.frontend import int32
from folovllm.frontend.generation_defaults import ModelDefaults
from folovllm.frontend.input_processor import InputProcessor, Request
from folovllm.frontend.prompts import Prompt, RenderedChat
from folovllm.frontend.tokenizer import Tokenizer
from tests.fakes.tokenizers_ import case_tokenizer, llama3_like_backend

IM_END, END_OF_TEXT = 151645, 151643
NUM_IDS = 151669


def processor(
    tokenizer: Tokenizer | None = None,
    defaults: ModelDefaults = ModelDefaults(eos_token_ids=(IM_END, END_OF_TEXT)),  # noqa: B008 - frozen
    max_model_len: int = 32,
    seed: int = 0,
) -> InputProcessor:
    return InputProcessor(
        tokenizer or case_tokenizer(),
        defaults,
        max_model_len=max_model_len,
        num_valid_token_ids=NUM_IDS,
        seeds=random.Random(seed),
    )


def one(prompt: Any, params: SamplingParams | None = None, **options: Any) -> Request:
    return processor(**options).process(prompt, params, request_id="r")


def test_every_form_of_a_prompt() -> None:
    for prompt in ("ab", {"prompt": "ab"}):
        request = one(prompt)
        assert (request.prompt, request.prompt_token_ids) == ("ab", [64, 65])
    for ids in ([64, 65], (64, 65), range(64, 66), {"prompt_token_ids": [64, 65]}):
        request = one(ids)
        assert (request.prompt, request.prompt_token_ids) == (None, [64, 65])


def test_a_rendered_chat_gets_no_special_tokens_of_the_tokenizer() -> None:
    tokenizer = Tokenizer(llama3_like_backend(), config={})
    begin = tokenizer.token_id("<|begin_of_text|>")
    assert one("a", tokenizer=tokenizer).prompt_token_ids[0] == begin
    assert begin not in one(RenderedChat("a"), tokenizer=tokenizer).prompt_token_ids


def test_a_list_is_one_prompt_of_ids_or_many_prompts() -> None:
    many = processor().process_many
    assert [r.prompt_token_ids for r in many([64, 65], None)] == [[64, 65]]
    mixed: list[Prompt] = [[64], "b", {"prompt": "x"}]
    assert [r.prompt_token_ids for r in many(mixed, None)] == [[64], [65], [87]]
    assert [r.request_id for r in many(["a", "b"], None, first_id=7)] == ["7", "8"]
    assert [r.prompt for r in many([RenderedChat("a"), RenderedChat("b")], None)] == ["a", "b"]


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "prompts is an empty list"),
        ("", "prompt is empty"),
        ([""], r"prompts\[0\]: prompt is empty"),
        (["a", []], r"prompts\[1\]: prompt_token_ids is empty"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt_token_ids": []}, "prompt_token_ids is empty"),
        ([-1], r"prompt_token_ids\[0\]=-1 is no token of this model: ids are 0 to 151668"),
        ([1, NUM_IDS], r"prompt_token_ids\[1\]=151669 is no token of this model"),
        ([2**70], "is no token of this model"),
        ([1, True], r"prompt_token_ids\[1\] must be a token id \(int\), not bool"),
        ([1.0], r"prompt_token_ids\[0\] must be a token id \(int\), not float"),
        ([1, "a"], r"prompt_token_ids\[1\] must be a token id \(int\), not str"),
        (["a", 1], r"prompts\[1\]: a prompt must be text or a list of token ids, not int"),
        (5, "prompts must be a string, token ids, a dict or a list of these, not int"),
        (b"ab", "not bytes"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "either prompt or prompt_token_ids.* got prompt, prompt_token_ids"),
        ({}, "got none"),
        ({"text": "a"}, "got text"),
        ({"prompt": 5}, "prompt must be a string, not int"),
        ({"prompt_token_ids": "ab"}, "prompt_token_ids must be a list of token ids, not str"),
        ({"prompt_token_ids": 5}, "must be text or a list of token ids, not int"),
        ({"cache_salt": "x"}, "got none"),
        ("a\ud800", "lone surrogate"),
    ],
)
def test_L12_wrong_prompts_are_refused_by_name(prompts: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        processor().process_many(prompts, None)
    assert caught.value.field in {"prompt", "prompts", "prompt_token_ids"}


def test_one_set_of_parameters_or_one_for_each() -> None:
    many = processor().process_many
    two = [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2)]
    assert [r.max_tokens for r in many(["a", "b"], two)] == [1, 2]
    assert [r.max_tokens for r in many(["a", "b"], two[0])] == [1, 1]
    assert [r.priority for r in many(["a", "b"], None, priority=[3, -1])] == [3, -1]
    assert [r.priority for r in many(["a", "b"], None, priority=2)] == [2, 2]
    assert [r.priority for r in many(["a", "b"], None)] == [0, 0]


@pytest.mark.parametrize(
    "name, message",
    [(5, "must be a string, not int"), (None, "not NoneType"), ("a\ud800", "holds half of a character")],
)
def test_a_name_that_no_message_can_hold_is_refused(name: Any, message: str) -> None:
    """The core would refuse the whole frame, and whatever else was in it."""
    with pytest.raises(RequestError, match=message) as caught:
        processor().process("a", None, request_id=name)
    assert caught.value.field == "request_id"


@pytest.mark.parametrize(
    "params, priority, message",
    [
        ([SamplingParams()], None, "sampling_params has 1 entries for 2 prompts"),
        ({"n": 1}, None, "sampling_params must be one SamplingParams or a list of them, not dict"),
        ([SamplingParams(), 5], None, r"prompts\[1\]: sampling_params must be a SamplingParams, not int"),
        (None, [1, 2, 3], "priority has 3 entries for 2 prompts"),
        (None, "high", "priority must be one int"),
        (None, True, "priority must be a whole number"),
        (None, 2**40, "priority must be a whole number of 32 bits"),
    ],
)
def test_wrong_parameters_are_refused_by_name(params: Any, priority: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        processor().process_many(["a", "b"], params, priority=priority)


def test_L39_explicit_values_win_over_the_files_also_0_and_1() -> None:
    defaults = ModelDefaults(temperature=0.6, top_k=1, top_p=0.9, min_p=0.1)
    row = one("a", SamplingParams(), defaults=defaults).sampling
    assert (row.temperature, row.top_k, row.top_p, row.min_p) == (0.6, 1, 0.9, 0.1)
    explicit = SamplingParams(temperature=1, top_k=-1, top_p=1, min_p=0)
    row = one("a", explicit, defaults=defaults).sampling
    assert (row.temperature, row.top_k, row.top_p, row.min_p) == (1.0, 0, 1.0, 0.0)
    assert one("a", SamplingParams(temperature=0), defaults=defaults).sampling.temperature == 0.0
    assert one("a", None, defaults=defaults).sampling.top_k == 1


@pytest.mark.parametrize("temperature", [0, 1e-6, 1e-30, 5e-324])
def test_L10_tiny_temperatures_are_greedy(temperature: float) -> None:
    row = one("a", SamplingParams(temperature=temperature, top_k=5, top_p=0.5, min_p=0.5)).sampling
    assert (row.temperature, row.top_k, row.top_p, row.min_p) == (0.0, 0, 1.0, 0.0)


def test_a_top_k_that_keeps_all_is_none() -> None:
    assert one("a", SamplingParams(top_k=2**31 - 1)).sampling.top_k == 0
    assert one("a", SamplingParams(top_k=0)).sampling.top_k == 0
    assert one("a", SamplingParams(top_k=7)).sampling.top_k == 7


def test_L08_the_stop_set_is_resolved_once() -> None:
    plain = one("a").stop
    assert plain.token_ids == (IM_END, END_OF_TEXT)
    assert [plain.reason(i) for i in plain.token_ids] == [None, None]
    ignored = one("a", SamplingParams(ignore_eos=True, stop_token_ids=[5, IM_END])).stop
    assert ignored.token_ids == (5, IM_END)
    assert [ignored.reason(i) for i in ignored.token_ids] == [5, IM_END]
    both = one("a", SamplingParams(stop_token_ids=[IM_END, 5])).stop
    assert both.token_ids == (IM_END, END_OF_TEXT, 5)
    assert both.reason(IM_END) is None
    sent = one("a", SamplingParams(stop_token_ids=[5])).sampling.stop_token_ids
    assert int32.unpack(sent) == [IM_END, END_OF_TEXT, 5]


def test_L05_a_stop_string_that_is_a_special_token_is_found_by_its_id() -> None:
    stop = one("a", SamplingParams(stop=["<|im_end|>", "x"], ignore_eos=True)).stop
    assert stop.token_ids == (IM_END,)
    assert stop.reason(IM_END) == "<|im_end|>"
    assert stop.strings == ("x",)
    with pytest.raises(RequestError, match="contains the special token"):
        one("a", SamplingParams(stop=["x<|im_end|>"]))


def test_L12_stop_token_ids_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(
        RequestError, match=r"stop_token_ids\[1\]=151669 is no token of this model: ids are 0 to 151668"
    ):
        one("a", SamplingParams(stop_token_ids=[1, NUM_IDS]))


def test_end_of_sequence_ids_beyond_the_tokens_are_left_out() -> None:
    assert one("a", defaults=ModelDefaults(eos_token_ids=(5, NUM_IDS))).stop.token_ids == (5,)


@pytest.mark.parametrize("given, length, expected", [(None, 2, 30), (16, 2, 16), (100, 2, 30), (16, 31, 1), (0, 2, 0)])
def test_L17_max_tokens_is_bounded_by_the_models_length(given: int | None, length: int, expected: int) -> None:
    assert one([1] * length, SamplingParams(max_tokens=given)).max_tokens == expected


@pytest.mark.parametrize("length", [32, 33, 1000])
def test_L17_a_prompt_without_room_is_refused_with_both_lengths(length: int) -> None:
    with pytest.raises(RequestError, match=rf"the prompt has {length} tokens.*may have 32 \(max_model_len\)"):
        one([1] * length)


def test_min_tokens_must_fit() -> None:
    assert one([1] * 30, SamplingParams(min_tokens=2)).sampling.min_tokens == 2
    with pytest.raises(RequestError, match="min_tokens=3 does not fit: the prompt has 30 tokens"):
        one([1] * 30, SamplingParams(min_tokens=3))


def test_L09_seeds_are_drawn_here_and_can_be_repeated() -> None:
    first, second, again = processor(), processor(), processor(seed=1)
    drawn = [[p.process("a", None, request_id="r").sampling.seed for _ in range(3)] for p in (first, second, again)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 3
    assert all(-(2**63) <= seed < 2**63 for seed in drawn[0])
    assert one("a", SamplingParams(seed=-5)).sampling.seed == -5


def test_the_message_to_the_core() -> None:
    request = processor().process("ab", SamplingParams(n=2, max_tokens=5, seed=3), request_id="name", priority=4)
    message = request.for_core(17, stream=True)
    assert (message.number, message.request_id, message.n, message.priority) == (17, "name", 2, 4)
    assert (message.max_tokens, message.stream) == (5, True)
    assert int32.unpack(message.prompt_token_ids) == [64, 65]
    assert message.sampling == request.sampling


def test_parameters_of_many_prompts_are_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = case_tokenizer()
    texts: list[str] = []
    encode = tokenizer.encode

    def counted(text: str, add_special_tokens: bool = True) -> list[int]:
        texts.append(text)
        return encode(text, add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", counted)
    shared, other = SamplingParams(bad_words=["x"]), SamplingParams(bad_words=["b"])
    requests = processor(tokenizer).process_many([[1], [2], [3]], [shared, other, shared])
    assert texts == ["x", " x", "b", " b"]
    assert [r.sampling.bad_words for r in requests] == [[int32.pack([i])] for i in (87, 65, 87)]
    assert len({r.sampling.seed for r in requests}) == 3


def test_everything_for_the_core_that_is_not_sampling() -> None:
    params = SamplingParams(timeout_s=2.5, structured_outputs=StructuredOutputsParams(regex="a+"))
    message = one({"prompt": "ab", "cache_salt": "tenant"}, params).for_core(0, stream=False)
    assert (message.timeout_s, message.grammar) == (2.5, Grammar("regex", "a+"))
    assert (message.cache_salt, message.skip_reading_prefix_cache) == ("tenant", False)
    plain = one("ab").for_core(0, stream=False)
    assert (plain.timeout_s, plain.grammar, plain.cache_salt, plain.skip_reading_prefix_cache) == (
        None,
        None,
        "",
        False,
    )
    assert one(RenderedChat("ab", "salt")).cache_salt == "salt"


@pytest.mark.parametrize(
    "params, skips",
    [
        ({"skip_reading_prefix_cache": True}, True),
        ({"skip_reading_prefix_cache": False}, False),
        ({"prompt_logprobs": 0}, True),
        ({"logprobs": 5}, False),
    ],
)
def test_L16_a_prompt_whose_log_probabilities_are_wanted_is_computed_whole(params: dict[str, Any], skips: bool) -> None:
    request = one("ab", SamplingParams(**params))
    assert request.for_core(0, stream=False).skip_reading_prefix_cache is skips
    assert request.reports_logprobs is ("logprobs" in params or "prompt_logprobs" in params)


@pytest.mark.parametrize(
    "keep, min_tokens, length, kept",
    [(3, 0, 10, 3), (10, 0, 3, 3), (31, 0, 100, 31), (-1, 0, 100, 31), (-1, 4, 100, 28), (-1, 0, 5, 5), (1, 0, 9, 1)],
)
def test_truncation_keeps_the_end_of_the_prompt(keep: int, min_tokens: int, length: int, kept: int) -> None:
    ids = list(range(length))
    request = one(ids, SamplingParams(truncate_prompt_tokens=keep, min_tokens=min_tokens))
    assert request.prompt_token_ids == ids[-kept:]
    assert request.max_tokens == min(16, 32 - kept)


def test_a_truncated_text_is_still_told_whole() -> None:
    request = one("abx1", SamplingParams(truncate_prompt_tokens=2))
    assert (request.prompt, request.prompt_token_ids) == ("abx1", [87, 16])


def test_a_truncation_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(RequestError, match=r"truncate_prompt_tokens=32 must be -1 or lie between 1 and 31") as caught:
        one([1] * 5, SamplingParams(truncate_prompt_tokens=32))
    assert caught.value.field == "truncate_prompt_tokens"


def test_log_probabilities_of_a_prompt_are_bounded() -> None:
    assert one([1] * 28, SamplingParams(prompt_logprobs=-1)).sampling.prompt_logprobs == -1
    with pytest.raises(RequestError, match=r"prompt_logprobs=-1 of 29 tokens are 4246760 log prob.*at most 4194304"):
        one([1] * 29, SamplingParams(prompt_logprobs=-1))


def test_L17_a_request_for_the_prompts_log_probabilities_alone() -> None:
    params = SamplingParams(
        max_tokens=0,
        prompt_logprobs=2,
        logprobs=1,
        seed=4,
        structured_outputs=StructuredOutputsParams(json_object=True),
    )
    message = one("ab", params).for_core(0, stream=True)
    assert message.sampling == SamplingRow(seed=4, prompt_logprobs=2)
    assert (message.max_tokens, message.grammar) == (1, None)


def test_a_model_without_tokenizer_has_no_text_to_constrain() -> None:
    inputs = InputProcessor(None, ModelDefaults(), max_model_len=9, num_valid_token_ids=9, seeds=random.Random(0))
    for params in ({"structured_outputs": StructuredOutputsParams(regex="a")}, {"bad_words": ["a"]}):
        with pytest.raises(RequestError, match="this model has no tokenizer") as caught:
            inputs.process([1], SamplingParams(**params), request_id="r")
        assert caught.value.field in params
