"""Messages with log probabilities → dictionaries by token, and the text shown for each."""

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.common.errors import ProtocolError
from folovllm.common.messages.core_worker import Logprobs
from folovllm.frontend import int32
from folovllm.frontend.logprobs import Place, TokenLogprobs, places
from folovllm.frontend.outputs import Logprob
from folovllm.frontend.tokenizer import Tokenizer
from tests.fakes.fake_core_for_frontend import logprobs_of
from tests.fakes.tokenizers_ import case_tokenizer, sentencepiece_like_tokenizer


def place(*entries: tuple[int, float], rank: int = 1) -> Place:
    ids, values = [entry[0] for entry in entries], [entry[1] for entry in entries]
    return Place(int32.pack(ids), struct.pack(f"<{len(values)}f", *values), rank)


def texts(tokenizer: Tokenizer, chosen: Sequence[int], alternative: int | None = None) -> list[list[str | None]]:
    """What is shown for each chosen token, and for the same alternative at each of them."""
    logprobs = TokenLogprobs(tokenizer)
    for token_id in chosen:
        logprobs.append(place((token_id, -0.5), *([(alternative, -1.0)] if alternative is not None else [])))
    return [[entry.decoded_token for entry in made.values()] for made in logprobs.made()]


def test_a_message_is_cut_into_places() -> None:
    message = Logprobs(
        counts=int32.pack([1, 3]),
        token_ids=int32.pack([7, 9, 8, 9]),
        values=struct.pack("<4f", -0.5, -2.0, -0.25, -2.0),
        ranks=int32.pack([4, 2]),
    )
    assert list(places(message)) == [place((7, -0.5), rank=4), place((9, -2.0), (8, -0.25), (9, -2.0), rank=2)]
    assert list(places(logprobs_of([], 3))) == []


def test_the_token_comes_first_then_its_alternatives_by_rank() -> None:
    logprobs = TokenLogprobs(None)
    logprobs.append(place((9, -3.0), (4, -0.5), (5, -1.0), rank=17))
    (made,) = logprobs.made()
    assert list(made.items()) == [(9, Logprob(-3.0, 17)), (4, Logprob(-0.5, 1)), (5, Logprob(-1.0, 2))]


def test_a_token_among_the_most_likely_stands_there_once_and_first() -> None:
    logprobs = TokenLogprobs(None)
    logprobs.append(place((5, -1.0), (4, -0.5), (5, -1.0), rank=2))
    assert list(logprobs.made()[0].items()) == [(5, Logprob(-1.0, 2)), (4, Logprob(-0.5, 1))]


def test_L15_no_alternatives_is_not_nothing() -> None:
    logprobs = TokenLogprobs(None)
    logprobs.append(place((5, -1.0), rank=3))
    assert logprobs.made() == [{5: Logprob(-1.0, 3)}]


def test_the_sum_follows_what_is_added_and_cut() -> None:
    logprobs = TokenLogprobs(None)
    for value in (-1.0, -0.5, -0.25):
        logprobs.append(place((5, value), (6, -9.0)))
    assert (len(logprobs), logprobs.cumulative) == (3, -1.75)
    assert len(logprobs.made()) == 3
    logprobs.cut(1)
    assert (len(logprobs), logprobs.cumulative, len(logprobs.made())) == (1, -1.0, 1)
    logprobs.append(place((7, -2.0)))
    assert [list(made) for made in logprobs.made()] == [[5, 6], [7]]
    assert [list(made) for made in logprobs.made(1)] == [[7]]


def test_a_token_without_log_probabilities_is_the_cores_fault() -> None:
    logprobs = TokenLogprobs(None)
    with pytest.raises(ProtocolError, match="the core reported 1 tokens and log probabilities of 0"):
        logprobs.cut(1)


def test_L16_parts_of_a_prompt_join_and_parts_computed_anew_change_nothing() -> None:
    logprobs = TokenLogprobs(None)
    all_places = list(places(logprobs_of([10, 11, 12, 13], 1)))
    logprobs.extend(0, all_places[:2])
    assert [list(made) for made in logprobs.made()] == [[10, 11], [11, 12]]
    logprobs.extend(0, all_places[:3])
    logprobs.extend(1, all_places[1:2])
    logprobs.extend(3, all_places[3:])
    assert [list(made) for made in logprobs.made()] == [[10, 11], [11, 12], [12, 13], [13, 14]]
    assert logprobs.cumulative == pytest.approx(-46 / 1000)


def test_L16_a_part_left_out_is_the_cores_fault() -> None:
    logprobs = TokenLogprobs(None)
    logprobs.extend(0, places(logprobs_of([1], 0)))
    with pytest.raises(ProtocolError, match="left out log probabilities 1 to 2 of a prompt"):
        logprobs.extend(3, places(logprobs_of([2], 0)))


def test_texts_of_whole_tokens_and_special_ones() -> None:
    assert texts(case_tokenizer(), [1150, 151645, 151667, 220], 64) == [
        ["DE", "a"],
        ["<|im_end|>", "a"],
        ["<think>", "a"],
        [" ", "a"],
    ]


def test_a_character_of_several_tokens_is_the_last_ones_text() -> None:
    # 123918 and 82912 are beginnings; 250 ends 🦜 with the first and 龜 with the second, 246 龘 with the second.
    assert texts(case_tokenizer(), [123918, 250, 64, 82912, 246], 250) == [
        ["", "\ufffd"],
        ["🦜"],
        ["a", "\ufffd"],
        ["", "\ufffd"],
        ["龘", "龜"],
    ]


def test_an_alternative_that_does_not_continue_a_character_is_shown_by_itself() -> None:
    assert texts(case_tokenizer(), [123918, 64], 1150) == [["", "DE"], ["a", "DE"]]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=12))
def test_the_texts_of_the_chosen_tokens_join_to_the_text(text: str) -> None:
    tokenizer = case_tokenizer()
    ids = [token_id for character in text for token_id in tokenizer.encode(character, add_special_tokens=False)]
    assert "".join(made[0] or "" for made in texts(tokenizer, ids)) == text


def test_pieces_with_a_blank_keep_it_and_bytes_wait_for_their_character() -> None:
    tokenizer = sentencepiece_like_tokenizer()
    hello, world = tokenizer.token_id("▁Hello"), tokenizer.token_id("▁world")
    parrot = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "🦜".encode()]
    a = tokenizer.token_id("a")
    assert hello is not None
    assert world is not None
    assert a is not None
    ids = [hello, world, *(token_id for token_id in parrot if token_id is not None), a]
    shown = [made[0] for made in texts(tokenizer, ids)]
    assert shown == [" Hello", " world", "", "", "", "🦜", "a"]


def test_without_tokenizer_no_text_is_shown() -> None:
    logprobs = TokenLogprobs(None)
    logprobs.append(place((5, -1.0)))
    assert [entry.decoded_token for entry in logprobs.made()[0].values()] == [None]
