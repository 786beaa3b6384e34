import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.common.errors import RequestError
from folovllm.frontend.detokenizer import Detokenizer, StopStrings, whole_text
from folovllm.frontend.tokenizer import Tokenizer
from tests.fakes.tokenizers_ import case_tokenizer, sentencepiece_like_tokenizer

IM_END = 151645
THINK, OK, END_THINK = 151667, 562, 151668
DE, FG, HI, J = 1150, 12001, 23913, 41
JSON = 5370
NEWLINE = 198
SMALL = case_tokenizer()
SENTENCEPIECE = sentencepiece_like_tokenizer()


def dealt(ids: list[int], step: int) -> list[list[int]]:
    return [ids[i : i + step] for i in range(0, len(ids), step)]


def stream(detokenizer: Detokenizer, ids: list[int], step: int = 1) -> list[str]:
    return [*(detokenizer.push(part) for part in dealt(ids, step)), detokenizer.finish()]


@pytest.mark.parametrize("step", [1, 2, 3, 9])
def test_L01_characters_over_several_tokens(cases_tokenizer: Tokenizer, step: int) -> None:
    ids = [32, 220, 99244, 123918, 250, 64, 82912, 246, 65]
    deltas = stream(Detokenizer(cases_tokenizer), ids, step)
    assert "".join(deltas) == "A 世🦜a龘b"
    assert whole_text(cases_tokenizer, ids) == "A 世🦜a龘b"
    assert not any("\ufffd" in delta for delta in deltas)


def test_L01_each_character_goes_out_once_when_it_is_complete(cases_tokenizer: Tokenizer) -> None:
    deltas = stream(Detokenizer(cases_tokenizer), [32, 220, 99244, 123918, 250, 64, 82912, 246, 65])
    assert deltas == ["A", " ", "世", "", "🦜", "a", "", "龘", "b", ""]


@pytest.mark.parametrize("with_eos", [False, True])
def test_L02_end_inside_a_character(cases_tokenizer: Tokenizer, with_eos: bool) -> None:
    ids = [87, 123918]
    detokenizer = Detokenizer(cases_tokenizer)
    deltas = [detokenizer.push(ids[:1]), detokenizer.push(ids[1:])]
    if with_eos:
        deltas.append(detokenizer.push([IM_END], ends_with_stop_token=True))
    assert "".join(deltas) == "x"
    text = "".join(deltas) + detokenizer.finish()
    assert text == whole_text(cases_tokenizer, ids) == "x\ufffd"
    assert text.encode("utf-8").decode("utf-8") == text
    assert detokenizer.num_tokens == 2 + with_eos


def test_finish_gives_the_rest_once() -> None:
    detokenizer = Detokenizer(SMALL)
    detokenizer.push([87, 123918])
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("skip", [True, False])
def test_L03_added_tokens_that_are_not_special(cases_tokenizer: Tokenizer, skip: bool) -> None:
    ids = [THINK, OK, END_THINK, 16]
    expected = "<think>ok</think>1"
    assert "".join(stream(Detokenizer(cases_tokenizer, skip_special_tokens=skip), ids)) == expected
    assert whole_text(cases_tokenizer, ids, skip_special_tokens=skip) == expected
    shown = expected if skip else expected + "<|im_end|>"
    assert "".join(stream(Detokenizer(cases_tokenizer, skip_special_tokens=skip), [*ids, IM_END])) == shown
    assert whole_text(cases_tokenizer, [*ids, IM_END], skip_special_tokens=skip) == shown


def test_L03_the_token_that_ended_the_answer_gives_no_text(cases_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(cases_tokenizer, skip_special_tokens=False)
    text = detokenizer.push([THINK, OK, IM_END], ends_with_stop_token=True) + detokenizer.finish()
    assert text == "<think>ok"
    assert detokenizer.num_tokens == 3
    assert detokenizer.stop_reason is None
    shown = Detokenizer(cases_tokenizer, skip_special_tokens=False, include_stop_str_in_output=True)
    assert shown.push([THINK, OK, IM_END], ends_with_stop_token=True) == "<think>ok<|im_end|>"


def test_L04_stop_over_all_tokens(cases_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(cases_tokenizer, stop=["DEFGHIJ"])
    assert stream(detokenizer, [DE, FG, HI, J]) == ["", "", "", "", ""]
    assert detokenizer.stop_reason == "DEFGHIJ"
    assert detokenizer.num_tokens == 4


def test_L04_only_what_could_be_a_stop_is_held_and_for_one_step_only(cases_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(cases_tokenizer, stop=["FGX"])
    assert stream(detokenizer, [DE, FG, HI, J]) == ["DE", "", "FGHI", "J", ""]
    assert detokenizer.stop_reason is None


def test_L04_stop_across_a_token_border(cases_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(cases_tokenizer, stop=["EF"])
    assert stream(detokenizer, [DE, FG, HI, J]) == ["D", "", "", "", ""]
    assert detokenizer.stop_reason == "EF"
    assert detokenizer.num_tokens == 2


def test_stop_string_kept_in_the_text_ends_it() -> None:
    detokenizer = Detokenizer(SMALL, stop=["EF"], include_stop_str_in_output=True)
    assert stream(detokenizer, [DE, FG, HI]) == ["D", "EF", "", ""]


def test_held_text_goes_out_at_the_end() -> None:
    detokenizer = Detokenizer(SMALL, stop=["FGX"])
    assert stream(detokenizer, [DE, FG]) == ["DE", "", "FG"]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_L05_stop_string_that_is_a_special_token(cases_tokenizer: Tokenizer, skip: bool, include: bool) -> None:
    detokenizer = Detokenizer(
        cases_tokenizer, stop=["<|im_end|>"], skip_special_tokens=skip, include_stop_str_in_output=include
    )
    text = "".join(stream(detokenizer, [JSON, IM_END, JSON]))
    assert text == ("JSON<|im_end|>" if include else "JSON")
    assert detokenizer.stop_reason == "<|im_end|>"
    assert detokenizer.num_tokens == 2


def test_L05_the_token_also_ends_held_text_and_half_characters() -> None:
    detokenizer = Detokenizer(SMALL, stop=["<|im_end|>", "JSONX"])
    assert stream(detokenizer, [JSON, 123918, IM_END]) == ["", "", "JSON\ufffd", ""]


def test_L05_a_stop_that_could_never_be_found_is_refused() -> None:
    with pytest.raises(RequestError, match="special token '<\\|im_end\\|>'") as caught:
        Detokenizer(SMALL, stop=["ok", "end<|im_end|>"])
    assert caught.value.field == "stop"
    detokenizer = Detokenizer(SMALL, stop=["ok<|im_end|>"], skip_special_tokens=False)
    assert "".join(stream(detokenizer, [JSON, OK, IM_END])) == "JSON"
    assert detokenizer.stop_reason == "ok<|im_end|>"


@pytest.mark.parametrize("step", [1, 3, 7])
def test_L07_min_tokens_and_stop_strings(cases_tokenizer: Tokenizer, step: int) -> None:
    ids = [64, NEWLINE, 64, 65, 87, 64, NEWLINE, 65]
    detokenizer = Detokenizer(cases_tokenizer, stop=["\n"], min_tokens=5)
    assert "".join(stream(detokenizer, ids, step)) == "a\nabxa"
    assert detokenizer.num_tokens == 7
    assert detokenizer.stop_reason == "\n"


def test_L07_a_match_passed_over_is_not_found_later() -> None:
    detokenizer = Detokenizer(SMALL, stop=["\n"], min_tokens=2)
    assert "".join(stream(detokenizer, [64, NEWLINE, 64, 65])) == "a\nab"
    assert detokenizer.stop_reason is None


def test_L07_a_match_that_is_complete_behind_the_floor_counts() -> None:
    detokenizer = Detokenizer(SMALL, stop=["EF"], min_tokens=1)
    assert "".join(stream(detokenizer, [DE, FG])) == "D"
    by_id = Detokenizer(SMALL, stop=["<|im_end|>"], min_tokens=2)
    assert "".join(stream(by_id, [JSON, IM_END, JSON, IM_END, JSON])) == "JSONJSON"
    assert by_id.num_tokens == 4


def test_L08_an_end_of_sequence_at_once_gives_no_text(cases_tokenizer: Tokenizer) -> None:
    for end in (151643, IM_END):
        detokenizer = Detokenizer(cases_tokenizer, stop=["x"])
        assert detokenizer.push([end], ends_with_stop_token=True) + detokenizer.finish() == ""
        assert (detokenizer.num_tokens, detokenizer.stop_reason) == (1, None)


def test_a_stop_string_before_the_token_that_ended_the_answer_wins() -> None:
    detokenizer = Detokenizer(SMALL, stop=["x"])
    assert detokenizer.push([64, 87, IM_END], ends_with_stop_token=True) == "a"
    assert (detokenizer.num_tokens, detokenizer.stop_reason) == (2, "x")


def test_of_several_stops_the_first_complete_one_ends_the_answer_and_the_longest_of_these() -> None:
    detokenizer = Detokenizer(SMALL, stop=["F", "DEF", "EFGH"])
    assert "".join(stream(detokenizer, [DE, FG, HI])) == ""
    assert detokenizer.stop_reason == "DEF"


def test_ids_that_no_token_has_give_no_text() -> None:
    assert "".join(stream(Detokenizer(SMALL), [64, 999_999, 777, 65])) == whole_text(SMALL, [64, 777, 65]) == "ab"


def test_many_stop_strings_cost_no_more_per_character() -> None:
    stop = [f"stop{i:03}" for i in range(256)]
    detokenizer = Detokenizer(SMALL, stop=stop)
    ids = SMALL.encode("stop and stop25 " + "stop255 tail")
    assert "".join(stream(detokenizer, ids)) == "stop and stop25 "
    assert detokenizer.stop_reason == "stop255"


def test_sentencepiece_text_is_the_same_streamed_and_whole() -> None:
    world, bang = SENTENCEPIECE.token_id("▁world"), SENTENCEPIECE.token_id("!")
    hello, a = SENTENCEPIECE.token_id("▁Hello"), SENTENCEPIECE.token_id("▁a")
    bytes_of_shi = [SENTENCEPIECE.token_id(f"<0x{byte:02X}>") for byte in "世".encode()]
    ids = [i for i in (hello, world, bang, 2, a, *bytes_of_shi, bang) if i is not None]
    assert len(ids) == 9
    assert stream(Detokenizer(SENTENCEPIECE), ids) == ["Hello", " world", "!", "", " a", "", "", "世", "!", ""]
    assert whole_text(SENTENCEPIECE, ids) == SENTENCEPIECE.decode(ids) == "Hello world! a世!"


def test_sentencepiece_does_not_wait_forever_for_a_character() -> None:
    byte = SENTENCEPIECE.token_id("<0xFF>")
    assert byte is not None
    detokenizer = Detokenizer(SENTENCEPIECE)
    deltas = stream(detokenizer, [byte] * 20)
    assert max(map(len, deltas)) <= 8
    assert "".join(deltas) == "\ufffd" * 20


@given(ids=st.lists(st.integers(0, SENTENCEPIECE.num_ids - 1), max_size=30), step=st.integers(1, 5))
def test_sentencepiece_streamed_equals_whole(ids: list[int], step: int) -> None:
    assert "".join(stream(Detokenizer(SENTENCEPIECE), ids, step)) == whole_text(SENTENCEPIECE, ids)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_streamed_equals_whole_on_the_demo_tokenizer(demo_tokenizer: Tokenizer, data: st.DataObject) -> None:
    any_id = st.integers(0, demo_tokenizer.num_ids - 1)
    single_byte = st.integers(17, 260)  # these are the tokens of one byte: most rows of them are invalid UTF-8
    ids = data.draw(st.lists(any_id | single_byte, max_size=40))
    skip, step = data.draw(st.booleans()), data.draw(st.integers(1, 5))
    streamed = "".join(stream(Detokenizer(demo_tokenizer, skip_special_tokens=skip), ids, step))
    assert streamed == whole_text(demo_tokenizer, ids, skip_special_tokens=skip)
    assert streamed == demo_tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_survives_the_way_through_ids(text: str) -> None:
    assert "".join(stream(Detokenizer(SMALL), SMALL.encode(text))) == text


@settings(max_examples=400, deadline=None)
@given(
    text=st.text(alphabet="ab", max_size=40),
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4),
    min_tokens=st.integers(0, 12),
    step=st.integers(1, 4),
)
def test_stop_strings_against_a_plain_search(text: str, stop: list[str], min_tokens: int, step: int) -> None:
    """One token per character here, so the right answer is easy to say."""
    ids = SMALL.encode(text)
    detokenizer = Detokenizer(SMALL, stop=stop, min_tokens=min_tokens)
    streamed = "".join(stream(detokenizer, ids, step))
    ends = [(end, text[:end]) for end in range(min_tokens + 1, len(text) + 1)]
    match = next(((end, s) for end, head in ends for s in sorted(stop, key=len)[::-1] if head.endswith(s)), None)
    if match is None:
        assert (streamed, detokenizer.stop_reason, detokenizer.num_tokens) == (text, None, len(ids))
    else:
        end, found = match
        assert (streamed, detokenizer.stop_reason, detokenizer.num_tokens) == (text[: end - len(found)], found, end)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab", max_size=30),
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_what_is_held_is_the_longest_end_that_can_still_become_a_stop(text: str, stop: list[str]) -> None:
    automaton = StopStrings(stop)
    node, _, _ = automaton.feed(0, text, passed_over=True)
    beginnings = {s[:i] for s in stop for i in range(1, len(s))}
    expected = max((len(end) for end in beginnings if text.endswith(end)), default=0)
    assert automaton.held[node] == expected
