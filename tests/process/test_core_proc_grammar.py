"""The core process and grammars: refused with the cause, enforced, ended in time; other requests do not notice."""

import json
import pathlib
import re
from collections.abc import Iterator

import numpy as np
import pytest

from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.messages.frontend_core import Grammar
from tests.fakes.core_engine import one_frontend, running_core, wait_until_empty
from tests.fakes.fake_frontend import FakeFrontend, make_request
from tests.fakes.fake_parent import FakeParent
from tests.fakes.fake_worker import Script, expected_output
from tests.fakes.model_folder import IM_END, write_tokenizer

STOPS = SamplingRow(stop_token_ids=np.array([IM_END], "<i4").tobytes())
GREEDY = SamplingRow()
PROMPT = [1, 2, 3, 4, 5]
NUMBER = Grammar("regex", "[1-9][0-9]{2,5}")


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeParent]:
    folder = tmp_path_factory.mktemp("core")
    (folder / "model").mkdir()
    write_tokenizer(folder / "model")
    with running_core(folder, Script(num_blocks=512), max_model_len=1024) as (parent, _):
        yield parent
        with FakeFrontend(parent.endpoint) as last:
            wait_until_empty(last)


@pytest.fixture
def frontend(core: FakeParent) -> Iterator[FakeFrontend]:
    with FakeFrontend(core.endpoint) as frontend:
        yield frontend


def text_of(frontend: FakeFrontend, number: int) -> str:
    """Its text without the token that stopped it."""
    tokens = frontend.output(number)
    finished = frontend.finished[number]
    assert finished.finish_reason == "stop"
    return bytes(tokens if finished.stop_token_id is None else tokens[:-1]).decode()


@pytest.mark.parametrize("stream", [True, False])
def test_a_grammar_holds_and_its_neighbours_get_what_they_get_alone(frontend: FakeFrontend, stream: bool) -> None:
    held = [make_request(i, PROMPT, 20, sampling=STOPS, grammar=NUMBER, stream=stream) for i in range(0, 6, 2)]
    free = [make_request(i, [*PROMPT, i], 20, stream=stream) for i in range(1, 6, 2)]
    frontend.add(*[request for pair in zip(held, free, strict=True) for request in pair])
    for request in held:
        assert re.fullmatch(NUMBER.text, text_of(frontend, request.number))
    for request in free:
        assert frontend.output(request.number) == expected_output([*PROMPT, request.number], 20, GREEDY)


def test_a_complete_text_ends_the_answer_also_where_eos_is_ignored(frontend: FakeFrontend) -> None:
    frontend.add(make_request(0, PROMPT, 50, grammar=Grammar("choice", '["yes", "no"]')))
    assert text_of(frontend, 0) in ("yes", "no")
    assert frontend.finished[0].stop_token_id is None


def test_n_answers_with_a_grammar(frontend: FakeFrontend) -> None:
    frontend.add(make_request(0, PROMPT, 20, sampling=STOPS, grammar=NUMBER, n=4))
    texts = [text_of(frontend, number) for number in range(4)]
    assert all(re.fullmatch(NUMBER.text, text) for text in texts)
    assert len(set(texts)) > 1


def test_the_token_limit_may_come_first(frontend: FakeFrontend) -> None:
    frontend.add(make_request(0, PROMPT, 2, sampling=STOPS, grammar=Grammar("regex", "a{9}")))
    assert frontend.output(0) == [ord("a")] * 2
    assert frontend.finished[0].finish_reason == "length"


def test_L07_L14_a_grammar_that_ends_below_min_tokens_ends_with_a_reason(frontend: FakeFrontend) -> None:
    sampling = SamplingRow(min_tokens=5)
    frontend.add(make_request(0, PROMPT, 20, sampling=sampling, grammar=Grammar("regex", "ab"), stream=True))
    frontend.wait_for(0)
    finished = frontend.finished[0]
    assert (finished.finish_reason, frontend.tokens[0]) == ("error", list(b"ab"))
    assert finished.error == "the grammar ended after 2 tokens, and min_tokens is 5"


@pytest.mark.parametrize(
    ("grammar", "cause"),
    [
        (Grammar("json", '{"type": "not-a-type"}'), "not-a-type"),
        (Grammar("json", '{"properties": {"foo": "bar"}}'), "schema must be"),
        (Grammar("json", '{"$ref": "#"}'), "NoExtension"),
        (Grammar("json", '{"pattern": "^(a"}'), "unclosed group"),
        (Grammar("json", '{"json_schema": {"type": "integer"}}'), "json_schema"),
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("lark", "start: A"), "unknown name"),
    ],
    ids=lambda value: value.text if isinstance(value, Grammar) else "",
)
def test_L28_bad_schemas_are_refused_before_admission(frontend: FakeFrontend, grammar: Grammar, cause: str) -> None:
    frontend.add(make_request(0, PROMPT, 9, grammar=grammar, n=3), make_request(3, PROMPT, 9))
    assert frontend.output(3) == expected_output(PROMPT, 9, GREEDY)
    frontend.wait_for(0)
    refusal = frontend.rejected[0]
    assert (refusal.kind, refusal.field) == ("invalid", "grammar")
    assert refusal.message.startswith("the grammar cannot be enforced: ") and cause in refusal.message
    del frontend.rejected[0]
    frontend.add(make_request(0, PROMPT, 9))  # its numbers are free again
    assert frontend.output(0) == expected_output(PROMPT, 9, GREEDY)


def test_L28_a_large_maximum_works(frontend: FakeFrontend) -> None:
    schema = {"type": "integer", "minimum": 10**9, "maximum": 20000000000}
    frontend.add(make_request(0, PROMPT, 60, sampling=STOPS, grammar=Grammar("json", json.dumps(schema))))
    assert 10**9 <= json.loads(text_of(frontend, 0)) <= 20000000000


def test_requests_can_be_aborted_while_their_grammar_is_compiled(frontend: FakeFrontend) -> None:
    for number in range(0, 40, 2):
        frontend.add(make_request(number, PROMPT, 500, grammar=Grammar("regex", f"a{{{number + 1}}}b*"), n=2))
        frontend.abort(number, number + 1)
    wait_until_empty(frontend)
    frontend.add(make_request(0, PROMPT, 9, grammar=Grammar("regex", "abc")))
    assert text_of(frontend, 0) == "abc"


def test_a_frontend_may_go_while_its_grammars_are_compiled(core: FakeParent) -> None:
    with FakeFrontend(core.endpoint) as leaving:
        leaving.add(*(make_request(i, PROMPT, 900, grammar=Grammar("regex", f"x{i}a*")) for i in range(20)))
    with FakeFrontend(core.endpoint) as staying:
        wait_until_empty(staying)
        staying.add(make_request(0, PROMPT, 9, grammar=Grammar("regex", "abc")))
        assert text_of(staying, 0) == "abc"


def test_a_time_limit_counts_from_receipt(frontend: FakeFrontend) -> None:
    frontend.add(make_request(0, PROMPT, 900, grammar=Grammar("regex", "(ab|ba){900}"), timeout_s=1e-6))
    frontend.wait_for(0)
    assert frontend.finished[0].finish_reason == "timeout"


@pytest.mark.parametrize("depth", [1, 2])
def test_preempted_requests_go_on_in_their_grammar(tmp_path: pathlib.Path, depth: int) -> None:
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model")
    options = {"max_model_len": 60, "pipeline_depth": depth, "max_num_seqs": 4}
    with one_frontend(tmp_path, Script(num_blocks=14), **options) as frontend:
        pattern = "(ab|cde){8,16}"
        for number in range(6):
            sampling = SamplingRow(seed=number, stop_token_ids=STOPS.stop_token_ids)
            frontend.add(make_request(number, PROMPT, 40, sampling=sampling, grammar=Grammar("regex", pattern)))
        texts = [text_of(frontend, number) for number in range(6)]
        assert all(re.fullmatch(pattern, text) for text in texts)
        assert sum(frontend.finished[number].num_preemptions for number in range(6))
        for number in range(6):  # alone
            sampling = SamplingRow(seed=number, stop_token_ids=STOPS.stop_token_ids)
            frontend.add(make_request(10 + number, PROMPT, 40, sampling=sampling, grammar=Grammar("regex", pattern)))
            assert text_of(frontend, 10 + number) == texts[number]


def test_a_model_without_a_tokenizer_refuses_grammars(tmp_path: pathlib.Path) -> None:
    with one_frontend(tmp_path, Script()) as frontend:
        frontend.add(make_request(0, PROMPT, 9, grammar=NUMBER))
        frontend.wait_for(0)
        refusal = frontend.rejected[0]
        assert (refusal.kind, refusal.field) == ("invalid", "grammar")
        assert "no tokenizer.json" in refusal.message


def test_a_tokenizer_that_cannot_be_read_is_the_cause(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with one_frontend(tmp_path, Script()) as frontend:
        frontend.add(make_request(0, PROMPT, 9, grammar=NUMBER), make_request(1, PROMPT, 9))
        assert frontend.output(1) == expected_output(PROMPT, 9, GREEDY)
        frontend.wait_for(0)
        assert "tokenizer.json cannot be used for grammars" in frontend.rejected[0].message
