"""The threads beside the loop: nobody is waited for longer than said, nothing is lost, everything comes to an end."""

import json
import os
import select
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.messages.frontend_core import Grammar
from folovllm.core_proc import grammar_threads
from folovllm.core_proc.grammar import CompiledGrammar, GrammarError, Matcher, Vocabulary
from folovllm.core_proc.grammar_threads import AnswerGrammar, Compilation, Grammars
from folovllm.core_proc.request import Request, RequestStatus
from tests.fakes.model_folder import byte_vocabulary
from tests.fakes.tokenizers_ import byte_level_backend

WAIT_S = 30.0
END = 256
NUM_IDS = 257


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    backend = byte_level_backend(byte_vocabulary())
    backend.add_special_tokens(["<|end|>"])
    return Vocabulary(backend.to_str(), NUM_IDS)


@pytest.fixture
def grammars(vocabulary: Vocabulary) -> Iterator[Grammars]:
    made = Grammars(lambda: vocabulary, settle_s=WAIT_S)
    yield made
    made.close()


def a_request(**sampling: Any) -> Request:
    row = SamplingRow(stop_token_ids=np.array([END], "<i4").tobytes(), **sampling)
    return Request(0, 0, "r", np.array([1], np.int32), row, 9)


def choice(*texts: str) -> Grammar:
    return Grammar("choice", json.dumps(texts))


def wait_for(grammars: Grammars) -> None:
    assert select.select([grammars.fd], [], [], WAIT_S)[0], "nothing was done in time"


def compile_now(grammars: Grammars, grammar: Grammar, *requests: Request) -> Compilation:
    grammars.compile(grammar, list(requests))
    assert grammars.num_compiling == len(requests)
    wait_for(grammars)
    (compilation,) = grammars.take_compiled()
    assert grammars.num_compiling == 0
    return compilation


def answer_of(request: Request) -> AnswerGrammar:
    assert isinstance(request.grammar, AnswerGrammar)
    return request.grammar


def test_requests_get_their_grammar_with_the_first_mask(grammars: Grammars) -> None:
    requests = [a_request(), a_request()]
    assert all(request.has_mask for request in requests)
    compilation = compile_now(grammars, choice("ab", "ac"), *requests)
    assert (compilation.requests, compilation.error) == (requests, "")
    assert answer_of(requests[0]).matcher is not answer_of(requests[1]).matcher
    assert all(request.has_mask for request in requests)
    assert grammars.take_compiled() == []


def test_a_refusal_comes_back_with_its_cause_and_is_kept_too(grammars: Grammars) -> None:
    for _ in range(2):
        request = a_request()
        compilation = compile_now(grammars, Grammar("regex", "(a"), request)
        assert "unclosed group" in compilation.error
        assert request.grammar is None


def test_L28_without_a_vocabulary_every_grammar_is_refused() -> None:
    def load() -> Vocabulary:
        raise GrammarError("no tokenizer here")

    grammars = Grammars(load)
    try:
        assert compile_now(grammars, choice("a"), a_request()).error == "no tokenizer here"
    finally:
        grammars.close()


def test_tokens_bring_masks_and_at_the_end_the_answer_is_over(grammars: Grammars) -> None:
    request = a_request()
    compile_now(grammars, choice("ab", "a"), request)
    answer = answer_of(request)
    answer.advance(ord("a"))
    assert grammars.settle() == []
    assert answer.mask is not None
    allowed = np.flatnonzero(np.unpackbits(np.frombuffer(answer.mask, np.uint8), bitorder="little"))
    assert allowed.tolist() == [ord("b"), END]
    answer.advance(ord("b"))
    assert grammars.settle() == [answer]
    assert answer.request is request and not request.has_mask
    assert answer.end == (True, "")
    assert grammars.settle() == []


def test_a_token_that_does_not_fit_ends_the_answer_with_an_error(grammars: Grammars) -> None:
    request = a_request()
    compile_now(grammars, choice("ab"), request)
    answer_of(request).advance(ord("x"))
    (answer,) = grammars.settle()
    is_complete, error = answer.end
    assert not is_complete and "does not fit the grammar" in error


def test_L07_L14_a_grammar_that_ends_below_min_tokens_is_an_error_with_a_reason(grammars: Grammars) -> None:
    request = a_request(min_tokens=3)
    compile_now(grammars, choice("ab"), request)
    answer_of(request).advance(ord("a"))
    assert grammars.settle() == []
    answer_of(request).advance(ord("b"))
    (answer,) = grammars.settle()
    assert answer.end == (False, "the grammar ended after 2 tokens, and min_tokens is 3")


class Gate:
    """A matcher's `take` that a test lets through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        take = Matcher.take

        def gated(matcher: Matcher, token_id: int) -> bytes | None:
            self.entered.set()
            assert self.open.wait(WAIT_S)
            return take(matcher, token_id)

        monkeypatch.setattr(Matcher, "take", gated)


def test_the_loop_goes_on_without_a_slow_grammar_and_is_told_when_it_is_done(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    grammars = Grammars(lambda: vocabulary, settle_s=0.001)
    try:
        request = a_request()
        compile_now(grammars, choice("abc"), request)
        answer_of(request).advance(ord("a"))
        assert gate.entered.wait(WAIT_S)
        for _ in range(3):
            assert grammars.settle() == []
            assert not request.has_mask
        assert select.select([grammars.fd], [], [], 0)[0] == []
        gate.open.set()
        wait_for(grammars)
        assert grammars.take_compiled() == []
        assert grammars.settle() == []
        assert request.has_mask
    finally:
        gate.open.set()
        grammars.close()


def test_compiling_goes_on_beside_a_slow_mask(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    slow, other = a_request(), a_request()
    compile_now(grammars, choice("abc"), slow)
    answer_of(slow).advance(ord("a"))
    assert gate.entered.wait(WAIT_S)
    assert compile_now(grammars, choice("xyz"), other).error == ""
    gate.open.set()
    assert grammars.settle() == []


def test_answers_that_have_ended_are_not_followed(grammars: Grammars) -> None:
    request = a_request()
    compile_now(grammars, choice("abc"), request)
    request.become(RequestStatus.FINISHED_ABORTED, "test")
    answer_of(request).advance(ord("a"))
    grammars.settle()
    assert answer_of(request).matcher.num_tokens == 0


def test_nothing_is_compiled_for_requests_that_have_ended(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_anew = grammar_threads._compiled
    compiled: list[str] = []

    def noted(grammar: Grammar, vocabulary: Vocabulary | GrammarError) -> CompiledGrammar | GrammarError:
        compiled.append(grammar.text)
        return compile_anew(grammar, vocabulary)

    monkeypatch.setattr(grammar_threads, "_compiled", noted)
    aborted, live = a_request(), a_request()
    aborted.become(RequestStatus.FINISHED_ABORTED, "test")
    assert compile_now(grammars, choice("ab"), aborted) == Compilation([aborted])
    assert (compiled, aborted.grammar) == ([], None)
    assert compile_now(grammars, choice("ab"), aborted, live).error == ""
    assert len(compiled) == 1 and live.has_mask


def test_the_descriptor_outlives_a_thread_that_is_still_at_work(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    grammars = Grammars(lambda: vocabulary, settle_s=0.0)
    request = a_request()
    compile_now(grammars, choice("ab"), request)
    answer_of(request).advance(ord("a"))
    assert gate.entered.wait(WAIT_S)
    monkeypatch.setattr(grammar_threads, "_JOIN_S", 0.01)
    grammars.close()
    os.fstat(grammars.fd)
    gate.open.set()
    monkeypatch.setattr(grammar_threads, "_JOIN_S", WAIT_S)
    grammars.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(grammars.fd)


def test_the_last_used_grammars_are_kept(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_anew = grammar_threads._compiled

    def counted(grammar: Grammar, vocabulary: Vocabulary | GrammarError) -> CompiledGrammar | GrammarError:
        compiled.append(json.loads(grammar.text)[0])
        return compile_anew(grammar, vocabulary)

    monkeypatch.setattr(grammar_threads, "_compiled", counted)
    monkeypatch.setattr(grammar_threads, "MAX_KEPT", 2)
    for text in "abacab":
        compile_now(grammars, choice(text), a_request())
    assert compiled == ["a", "b", "c", "b"]


@pytest.mark.parametrize("broken", [RuntimeError("boom"), KeyboardInterrupt("boom")])
def test_what_breaks_in_the_library_ends_one_request_and_not_the_thread(
    broken: BaseException, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise broken

    request, second = a_request(), a_request()
    compile_now(grammars, choice("ab"), request)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Matcher, "take", fail)
        answer_of(request).advance(ord("a"))
        (answer,) = grammars.settle()
        assert answer.end == (False, "the grammar failed: boom")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledGrammar, "__init__", fail)
        assert compile_now(grammars, choice("ac"), a_request()).error == "the compiler failed: boom"
    compile_now(grammars, choice("ad"), second)
    answer_of(second).advance(ord("a"))
    assert grammars.settle() == []
    assert second.has_mask


def test_a_grammar_that_takes_too_long_for_one_token_is_given_up(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = a_request()
    compile_now(grammars, choice("ab"), request)
    monkeypatch.setattr(grammar_threads, "_MAX_TOKEN_CPU_S", -1.0)
    answer_of(request).advance(ord("a"))
    (answer,) = grammars.settle()
    assert "for one token" in answer.end[1]
    monkeypatch.setattr(grammar_threads, "_MAX_COMPILE_CPU_S", -1.0)
    assert "to compile" in compile_now(grammars, choice("xx"), a_request()).error


def test_close_ends_the_threads(vocabulary: Vocabulary) -> None:
    def threads() -> list[str]:
        return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("grammar-"))

    grammars = Grammars(lambda: vocabulary)
    assert threads() == ["grammar-compile", "grammar-masks"]
    grammars.compile(choice("a"), [a_request()])
    grammars.close()
    assert threads() == []
