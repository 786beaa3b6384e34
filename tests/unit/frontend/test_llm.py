"""`LLM` against a fake core: what it sends, what it gives back, and that nothing is left behind."""

import gc
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from folovllm.common.errors import (
    ConfigError,
    EngineDeadError,
    ModelError,
    QueueFullError,
    RequestError,
    RequestFailedError,
)
from folovllm.common.messages.frontend_core import EngineCoreOutputs, EngineCoreRequest, RejectedRequest
from folovllm.common.sampling_params import SamplingParams
from folovllm.common.transport import encode
from folovllm.frontend import int32
from folovllm.frontend.batch import Batch
from folovllm.frontend.llm import LLM
from folovllm.frontend.prompts import Prompt
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.model_folder import IM_END, ids_of, write_model_folder


@pytest.fixture
def llm(core: FakeCore) -> Iterator[LLM]:
    with LLM(engine=core.endpoint) as made:
        yield made


def tokens(count: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, **more)


def test_generate_answers_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts: list[Prompt] = ["abc", ids_of("xy"), {"prompt": "12"}]
    outputs = llm.generate(prompts, [tokens(9), tokens(1), tokens(2)], use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == ["cbacbacba", "y", "21"]
    assert [output.prompt for output in outputs] == ["abc", None, "12"]
    assert outputs[0].prompt_token_ids == ids_of("abc")
    assert [output.request_id for output in outputs] == ["0", "1", "2"]
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)
    assert llm.generate("a", tokens(1), use_tqdm=False)[0].request_id == "3"


def test_generate_reports_times_and_cached_tokens(llm: LLM) -> None:
    (output,) = llm.generate("abc", tokens(4), use_tqdm=False)
    metrics = output.metrics
    assert metrics is not None
    assert (metrics.time_in_queue, metrics.num_generation_tokens, metrics.num_preemptions) == (0.25, 4, 1)
    assert metrics.time_to_first_token == pytest.approx(0.5)
    assert metrics.total_time is not None
    assert output.num_cached_tokens == 3


def test_a_request_without_stream_is_reported_once(llm: LLM, core: FakeCore) -> None:
    llm.generate(["ab", "cd"], [tokens(2), tokens(2, stop=["x"])], use_tqdm=False)
    assert [request.stream for request in core.requests] == [False, True]


def test_n_answers_come_by_index(llm: LLM) -> None:
    (output,) = llm.generate("abcd", tokens(2, n=3), use_tqdm=False)
    assert [(answer.index, answer.text) for answer in output.outputs] == [(0, "dc"), (1, "cb"), (2, "ba")]


def test_a_stop_string_ends_the_answer_and_aborts_it_in_the_core(llm: LLM, core: FakeCore) -> None:
    (output,) = llm.generate("abc", tokens(30, stop=["ac"]), use_tqdm=False)
    answer = output.outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("cb", "stop", "ac")
    assert answer.token_ids == ids_of("cbac")
    assert core.wait_until(lambda: not core.live)


def test_max_tokens_0_is_answered_without_the_core(llm: LLM, core: FakeCore) -> None:
    (first, second) = llm.generate(["abc", "abc"], [tokens(0), tokens(1)], use_tqdm=False)
    assert (first.outputs[0].text, first.outputs[0].token_ids, first.outputs[0].finish_reason) == ("", [], "length")
    assert second.outputs[0].text == "c"
    assert len(core.requests) == 1


def test_L34_a_bad_prompt_refuses_the_call_before_anything_is_sent(llm: LLM, core: FakeCore) -> None:
    with pytest.raises(RequestError, match=r"prompts\[2\]: the prompt has 64 tokens.*64"):
        llm.generate(["ok", "ok", "x" * 64], tokens(4), use_tqdm=False)
    (output,) = llm.generate("p", tokens(2), use_tqdm=False)
    assert output.outputs[0].text == "pp"
    assert len(core.requests) == 1


def test_L34_a_call_that_raises_leaves_nothing_in_the_core(llm: LLM, core: FakeCore) -> None:
    core.reject = lambda request: _refuse_y(request)
    core.gate.clear()
    with pytest.raises(RequestError, match="request 1: no y") as caught:
        llm.generate(["x", "y", "x"], tokens(8), use_tqdm=False)
    assert caught.value.field == "prompt"
    assert core.wait_until(lambda: not core.live)
    core.gate.set()
    (output,) = llm.generate("ab", tokens(2), use_tqdm=False)
    assert output.outputs[0].text == "ba"


def _refuse_y(request: EngineCoreRequest) -> RejectedRequest | None:
    if request.prompt_token_ids == int32.pack(ids_of("y")):
        return RejectedRequest(request.number, "invalid", "no y", "prompt")
    return None


def test_L34_an_interrupted_call_leaves_nothing_in_the_core(
    llm: LLM, core: FakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core.gate.clear()
    receive = llm._open.client.receive
    calls = iter(range(2))

    def interrupted(timeout_s: float | None = None) -> Any:
        if next(calls) == 0:
            return receive(0.0)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm._open.client, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], tokens(8, n=2), use_tqdm=False)
    assert core.wait_until(lambda: len(core.aborted) == 4)
    core.gate.set()
    assert [output.outputs[0].text for output in llm.generate(["ab"], tokens(2), use_tqdm=False)] == ["ba"]
    assert not llm._open.outputs.live


def test_a_full_queue_says_when_to_come_back(llm: LLM, core: FakeCore) -> None:
    core.reject = lambda request: RejectedRequest(request.number, "queue_full", "full", retry_after_s=2.5)
    with pytest.raises(QueueFullError) as caught:
        llm.generate("a", tokens(1), use_tqdm=False)
    assert caught.value.retry_after_s == 2.5


def test_a_failed_request_raises_its_cause(llm: LLM, core: FakeCore) -> None:
    core.fail_with = lambda request: "out of paper"
    with pytest.raises(RequestFailedError, match="request 0 failed: out of paper"):
        llm.generate("a", tokens(1, n=2), use_tqdm=False)
    assert core.wait_until(lambda: not core.live)
    core.fail_with = lambda request: ""
    assert llm.generate("a", tokens(1), use_tqdm=False)[0].outputs[0].text == "a"


def test_one_connection_carries_all_requests_of_a_large_call(llm: LLM, core: FakeCore) -> None:
    outputs = llm.generate([[1 + i % 200] for i in range(600)], tokens(1), use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [[1 + i % 200] for i in range(600)]
    assert len({identity for identity, _ in core.live}) <= 1


def test_batch_keeps_the_number_of_answers_in_the_core_bounded(llm: LLM) -> None:
    requests = llm._open.inputs.process_many(["a"] * 5, tokens(1, n=3))
    batch = Batch(requests, max_in_core=6)
    assert len(batch.next_portion()) == 2
    single = Batch(requests[:1], max_in_core=2)
    assert len(single.next_portion()) == 1


def test_chat_renders_and_answers(llm: LLM) -> None:
    question = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(question, tokens(1), use_tqdm=False)
    assert output.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    outputs = llm.chat([question, question], tokens(1), use_tqdm=False, chat_template_kwargs={"enable_thinking": False})
    assert [output.prompt[-6:] for output in outputs if output.prompt] == ["\nquick"] * 2
    (output,) = llm.chat(question, tokens(1), use_tqdm=False, add_generation_prompt=False)
    assert output.prompt == "<|im_start|>user\nhi<|im_end|>\n"


def test_chat_names_the_conversation_at_fault(llm: LLM) -> None:
    with pytest.raises(RequestError, match="conversation 1: messages is empty"):
        llm.chat([[{"role": "user", "content": "hi"}], []], use_tqdm=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'thinking'"):
        llm.chat([{"role": "user", "content": "hi"}], thinking=True)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="must not hold add_generation_prompt"):
        llm.chat([{"role": "user", "content": "hi"}], chat_template_kwargs={"add_generation_prompt": True})


def test_stream_gives_deltas_that_join_to_the_whole(llm: LLM) -> None:
    whole = llm.generate("aé", tokens(7), use_tqdm=False)[0].outputs[0]
    deltas = list(llm.stream("aé", tokens(7)))
    assert "".join(delta.outputs[0].text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.outputs[0].token_ids] == whole.token_ids
    assert all(delta.outputs[0].text for delta in deltas[:-1])
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert deltas[-1].outputs[0].finish_reason == "length"


def test_streams_and_generate_go_on_beside_each_other(llm: LLM, core: FakeCore) -> None:
    core.gate.clear()
    first, second = llm.stream("ab", tokens(4)), llm.stream("cd", tokens(4))
    core.gate.set()
    assert llm.generate("ef", tokens(20), use_tqdm=False)[0].outputs[0].text == "fe" * 10
    assert "".join(delta.outputs[0].text for delta in second) == "dcdc"
    assert "".join(delta.outputs[0].text for delta in first) == "baba"


def test_closing_or_dropping_a_stream_aborts_it(llm: LLM, core: FakeCore) -> None:
    core.gate.clear()
    closed = llm.stream("ab", tokens(60))
    dropped: Any = llm.stream("ab", tokens(60))
    assert core.wait_until(lambda: len(core.live) == 2)
    closed.close()
    assert list(closed) == []
    del dropped
    gc.collect()
    assert core.wait_until(lambda: len(core.aborted) == 2 and not core.live)
    assert not llm._open.outputs.live


def test_a_stream_closed_while_another_thread_is_in_a_call_is_aborted_by_that_call(llm: LLM, core: FakeCore) -> None:
    stream = llm.stream("ab", tokens(60))
    number = core.wait_until(lambda: bool(core.requests)) and core.requests[0].number
    core.gate.clear()
    inside, texts = threading.Event(), []

    def call() -> None:
        inside.set()
        texts.append(llm.generate("cd", tokens(2), use_tqdm=False)[0].outputs[0].text)

    thread = threading.Thread(target=call)
    thread.start()
    assert inside.wait(30)
    assert core.wait_until(lambda: len(core.requests) == 2)
    stream.close()
    core.gate.set()
    thread.join(30)
    assert texts == ["dc"]
    llm.get_stats()  # whatever was left is dealt with by now
    assert core.wait_until(lambda: number in core.aborted or not core.live)


def test_get_stats_asks_the_engine(llm: LLM, core: FakeCore) -> None:
    core.gate.clear()
    with llm.stream("ab", tokens(4)):
        assert core.wait_until(lambda: len(core.live) == 1)
        assert llm.get_stats().num_running == 1
    assert core.wait_until(lambda: not core.live)
    assert llm.get_stats().num_running == 0


def test_the_end_of_the_engine_raises_its_cause_and_stays(llm: LLM, core: FakeCore) -> None:
    core.gate.clear()
    stream = llm.stream("ab", tokens(4))
    core.fail("worker-0: RuntimeError: broken")
    with pytest.raises(EngineDeadError, match="worker-0: RuntimeError: broken"):
        llm.generate("a", tokens(1), use_tqdm=False)
    with pytest.raises(EngineDeadError, match="broken"):
        next(stream)
    with pytest.raises(EngineDeadError, match="broken"):
        llm.get_stats()


def test_a_lost_connection_is_noticed_at_once(model_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with FakeCore(f"ipc://{tmp_path}/core", model=str(model_folder)) as core:
        llm = LLM(engine=core.endpoint)
        core.gate.clear()
        stream = llm.stream("ab", tokens(4))
    with pytest.raises(EngineDeadError, match=r"connection to the engine at ipc://.* was lost"):
        next(stream)
    llm.close()


def test_a_closed_llm_says_so(core: FakeCore) -> None:
    llm = LLM(engine=core.endpoint)
    stream = llm.stream("ab", tokens(40))
    llm.close()
    llm.close()
    with pytest.raises(EngineDeadError, match="was closed"):
        llm.generate("a", use_tqdm=False)
    with pytest.raises(EngineDeadError, match="was closed"):
        next(stream)


def test_options_are_refused_where_they_have_no_effect(core: FakeCore, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"block_size, max_num_seqs cannot be given with engine="):
        LLM(engine=core.endpoint, block_size=8, max_num_seqs=4)
    with pytest.raises(
        TypeError, match=r"LLM\(\) got an unexpected keyword argument 'blocksize' \(did you mean 'block_size'\?\)"
    ):
        LLM("demo", blocksize=8)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"argument 'modle' \(did you mean 'model'\?\)"):
        LLM(modle="demo")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"argument 'tensor_parallel_size'; options are dtype"):
        LLM("demo", tensor_parallel_size=2)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="give a model"):
        LLM()
    with pytest.raises(ConfigError, match="is not what this engine serves"):
        LLM(write_model_folder(tmp_path / "other"), engine=core.endpoint)


def test_a_model_folder_given_with_engine_must_be_the_same(core: FakeCore, model_folder: pathlib.Path) -> None:
    with LLM(model_folder, engine=core.endpoint) as llm:
        assert llm.generate("ab", tokens(1), use_tqdm=False)[0].outputs[0].text == "b"


def test_an_engine_elsewhere_needs_a_copy_of_the_model(model_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with FakeCore(f"ipc://{tmp_path}/core", model="/not/here") as core:
        with pytest.raises(ModelError, match="/not/here is not on this machine"):
            LLM(engine=core.endpoint)
        with LLM(model_folder, engine=core.endpoint) as llm:
            assert llm.generate("ab", tokens(1), use_tqdm=False)[0].outputs[0].text == "b"


def test_a_model_without_tokenizer_takes_ids_and_gives_no_text(tmp_path: pathlib.Path) -> None:
    folder = write_model_folder(tmp_path / "bare", with_tokenizer=False)
    with FakeCore(f"ipc://{tmp_path}/core", model=str(folder)) as core, LLM(engine=core.endpoint) as llm:
        answer = llm.generate([5, 6], tokens(3), use_tqdm=False)[0].outputs[0]
        assert (answer.text, answer.token_ids) == ("", [6, 5, 6])
        streamed = [token for delta in llm.stream([5, 6], tokens(3)) for token in delta.outputs[0].token_ids]
        assert streamed == [6, 5, 6]
        for call in (llm.get_tokenizer, lambda: llm.generate("text"), lambda: llm.chat([{"role": "user"}])):
            with pytest.raises(RequestError, match="no tokenizer"):
                call()
        with pytest.raises(RequestError, match="stop_token_ids instead of stop strings"):
            llm.generate([5], SamplingParams(stop="x"))


def test_defaults_and_tokenizer_can_be_asked_for(llm: LLM) -> None:
    neutral = SamplingParams(temperature=1.0, top_k=-1, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    assert llm.get_default_sampling_params() == neutral
    assert llm.get_tokenizer().eos_token_id == IM_END
    assert "connect" in llm.startup.table()


def test_log_probabilities_of_answers_and_prompt(llm: LLM, core: FakeCore) -> None:
    params = [tokens(3, logprobs=2, prompt_logprobs=0), tokens(3), tokens(3, logprobs=0, n=2)]
    both, none, two = llm.generate(["abcd", "ab", "xy"], params, use_tqdm=False)
    assert [request.stream for request in core.requests] == [True, False, True]
    answer = both.outputs[0]
    assert answer.logprobs is not None
    assert [list(entry) for entry in answer.logprobs] == [[t, t + 1, t + 2] for t in ids_of("dcb")]
    first = ids_of("d")[0]
    assert answer.logprobs[0][first].decoded_token == "d"
    assert [entry.rank for entry in answer.logprobs[0].values()] == [2, 1, 2]
    assert answer.cumulative_logprob == pytest.approx(-sum(ids_of("dcb")) / 1000)
    assert both.prompt_logprobs is not None
    assert [entry and list(entry) for entry in both.prompt_logprobs] == [None, *([t] for t in ids_of("bcd"))]
    assert (none.prompt_logprobs, none.outputs[0].logprobs, none.outputs[0].cumulative_logprob) == (None,) * 3
    assert [[list(entry) for entry in answer.logprobs or ()] for answer in two.outputs] == [
        [[t] for t in ids_of("yxy")],
        [[t] for t in ids_of("xyx")],
    ]


def test_L17_a_prompts_log_probabilities_without_an_answer(llm: LLM, core: FakeCore) -> None:
    params = tokens(0, prompt_logprobs=1, n=2, logprobs=1, bad_words=["x"])
    (output,) = llm.generate("abc", params, use_tqdm=False)
    assert [(a.text, a.token_ids, a.finish_reason, a.logprobs) for a in output.outputs] == [("", [], "length", [])] * 2
    assert [entry and list(entry) for entry in output.prompt_logprobs or ()] == [
        None,
        *([t, t + 1] for t in ids_of("bc")),
    ]
    assert (core.requests[0].max_tokens, core.requests[0].sampling.bad_words) == (1, [])
    assert output.metrics is not None
    assert output.metrics.num_generation_tokens == 0


def test_a_stream_of_log_probabilities_joins_to_the_whole(llm: LLM) -> None:
    params = tokens(6, logprobs=1, prompt_logprobs=0)
    (whole,) = llm.generate("abc", params, use_tqdm=False)
    deltas = list(llm.stream("abc", params))
    answers = [delta.outputs[0] for delta in deltas]
    assert [entry for answer in answers for entry in answer.logprobs or ()] == whole.outputs[0].logprobs
    assert all(len(answer.logprobs or ()) == len(answer.token_ids) for answer in answers)
    assert answers[-1].cumulative_logprob == pytest.approx(whole.outputs[0].cumulative_logprob)
    assert deltas[0].prompt_logprobs == whole.prompt_logprobs
    assert all(delta.prompt_logprobs is None for delta in deltas[1:])


def test_token_ids_without_text(llm: LLM) -> None:
    (output,) = llm.generate("abc", tokens(3, detokenize=False, logprobs=0), use_tqdm=False)
    answer = output.outputs[0]
    assert (answer.text, answer.token_ids) == ("", ids_of("cba"))
    assert answer.logprobs is not None
    assert [entry.decoded_token for place in answer.logprobs for entry in place.values()] == [None] * 3
    streamed = list(llm.stream("abc", tokens(3, detokenize=False)))
    assert [token for delta in streamed for token in delta.outputs[0].token_ids] == ids_of("cba")
    assert "".join(delta.outputs[0].text for delta in streamed) == ""


def test_a_time_limit_has_a_reason_of_its_own(llm: LLM, core: FakeCore) -> None:
    (output,) = llm.generate("abc", tokens(5, timeout_s=0.5), use_tqdm=False)
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("c", "timeout")
    assert core.requests[0].timeout_s == 0.5


def test_the_prefix_cache_can_be_reset(llm: LLM, core: FakeCore) -> None:
    assert llm.get_stats().num_cached_blocks == 7
    assert llm.reset_prefix_cache() is True
    assert core.num_cached_blocks == 0
    assert llm.get_stats().num_cached_blocks == 0


def test_the_salt_of_a_chat_reaches_the_core(llm: LLM, core: FakeCore) -> None:
    llm.chat([{"role": "user", "content": "a"}], tokens(1), use_tqdm=False, cache_salt="tenant 7")
    llm.generate({"prompt": "a", "cache_salt": "b"}, tokens(1), use_tqdm=False)
    assert [request.cache_salt for request in core.requests] == ["tenant 7", "b"]


def test_a_message_that_nobody_is_to_blame_for_ends_the_link(llm: LLM, core: FakeCore) -> None:
    core.gate.clear()
    stream = llm.stream("ab", tokens(4))
    core.send_raw(encode(EngineCoreOutputs(b"\0" * 8, b"\0" * 4)))
    for call in (lambda: next(stream), lambda: llm.generate("ab", tokens(1), use_tqdm=False), llm.get_stats):
        with pytest.raises(EngineDeadError, match="given up, as it makes no sense: the core sent 1 tokens"):
            call()
    core.gate.set()
    assert core.wait_until(lambda: not core.live)  # it sees that nobody is there
