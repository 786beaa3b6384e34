"""Prompts and lengths: what was asked for, the same for the same seed."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from folovllm.common.errors import ConfigError
from folovllm.frontend.benchmark.workload import (
    MAX_PROMPT_TOKENS,
    MAX_TOKENS,
    SHAREGPT_MEAN_OUTPUT,
    SHAREGPT_MEAN_PROMPT,
    WORDS,
    RandomLengths,
    Work,
    random_works,
    sharegpt_like_works,
    sharegpt_works,
)


def test_words_are_many_and_different() -> None:
    assert len(set(WORDS)) == len(WORDS) > 200
    assert all(word.isalpha() and word == word.lower() for word in WORDS)


def test_random_works_have_the_lengths_asked_for() -> None:
    works = random_works(5, RandomLengths(12, 7), seed=1)
    assert [(len(work.prompt.split()), work.prompt_len, work.output_len) for work in works] == [(12, 12, 7)] * 5
    assert len({work.prompt for work in works}) == 5


def test_the_same_seed_gives_the_same_works() -> None:
    lengths = RandomLengths(20, 20, range_ratio=0.5)
    assert random_works(9, lengths, 1) == random_works(9, lengths, 1) != random_works(9, lengths, 2)
    assert sharegpt_like_works(9, 1) == sharegpt_like_works(9, 1) != sharegpt_like_works(9, 2)


def test_lengths_lie_around_their_middles() -> None:
    works = random_works(400, RandomLengths(100, 40, range_ratio=0.25), seed=0)
    assert {min(w.prompt_len for w in works), max(w.prompt_len for w in works)} == {75, 125}
    assert {min(w.output_len for w in works), max(w.output_len for w in works)} == {30, 50}
    assert min(work.output_len for work in random_works(50, RandomLengths(1, 1, range_ratio=0.9), 0)) == 1


def test_a_prefix_is_shared_and_comes_on_top() -> None:
    works = random_works(3, RandomLengths(4, 2, prefix_len=6), seed=0)
    words = [work.prompt.split() for work in works]
    assert len({tuple(each[:6]) for each in words}) == 1 and len({tuple(each[6:]) for each in words}) == 3
    assert [work.prompt_len for work in works] == [10] * 3


@pytest.mark.parametrize(
    "lengths, message",
    [
        ({"range_ratio": 1.0}, "range ratio 1.0"),
        ({"range_ratio": -0.1}, "range ratio -0.1"),
        ({"input_len": 0}, "input length 0 must be at least 1"),
        ({"output_len": 0}, "output length 0 must be at least 1"),
        ({"prefix_len": -1}, "prefix length -1 must be at least 0"),
    ],
)
def test_lengths_that_are_none(lengths: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RandomLengths(**lengths)


def test_sharegpt_like_lengths_have_its_means_and_bounds() -> None:
    works = sharegpt_like_works(4000, seed=0)
    assert all(len(work.prompt.split()) == work.prompt_len for work in works[:50])
    assert all(4 <= w.prompt_len <= MAX_PROMPT_TOKENS and w.prompt_len + w.output_len <= MAX_TOKENS for w in works)
    means = np.mean([work.prompt_len for work in works]), np.mean([work.output_len for work in works])
    assert means == pytest.approx((SHAREGPT_MEAN_PROMPT, SHAREGPT_MEAN_OUTPUT), rel=0.15), "the longest are left out"


def conversation(*values: str) -> dict[str, Any]:
    speakers = ("human", "gpt")
    turns = [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": "x", "conversations": turns}


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "sharegpt.json"
    long = "word " * 5000
    usable = [conversation(f"question number {i} of some words", "an answer of some length", "more") for i in range(8)]
    useless = [conversation("only a question that nobody answers"), conversation("hi", "x" * 99)]
    path.write_text(json.dumps([*usable, *useless, conversation(long, long), conversation("a question here", "no")]))
    return path


def test_sharegpt_takes_first_questions_and_the_lengths_of_their_answers(file: pathlib.Path) -> None:
    works = sharegpt_works(file, 8, seed=0)
    assert {work.prompt for work in works} == {f"question number {i} of some words" for i in range(8)}
    assert {(work.prompt_len, work.output_len) for work in works} == {(8, 6)}, "4 characters a token"
    assert works == sharegpt_works(file, 8, seed=0) != sharegpt_works(file, 8, seed=1)


def test_a_tokenizer_counts_better(file: pathlib.Path) -> None:
    works = sharegpt_works(file, 3, seed=0, count_tokens=lambda text: len(text.split()))
    assert {(work.prompt_len, work.output_len) for work in works} == {(6, 5)}
    fixed = sharegpt_works(file, 9, seed=0, output_len=50)
    assert {work.output_len for work in fixed} == {50}
    assert "a question here" in {work.prompt for work in fixed}, "its own answer is too short, and not used"


def test_a_short_file_is_gone_through_again(file: pathlib.Path) -> None:
    works = sharegpt_works(file, 20, seed=3)
    assert len(works) == 20 and works[:8] == works[8:16]


@pytest.mark.parametrize("text", ["", "{}", '[{"conversations": [{"value": 3}]}]', "[1]", '"\ud800"'])
def test_files_of_another_form(tmp_path: pathlib.Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match="cannot be read as ShareGPT's conversations"):
        sharegpt_works(path, 1, 0)


def test_a_missing_file_and_one_without_use(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        sharegpt_works(tmp_path / "none", 1, 0)
    (tmp_path / "useless.json").write_text(json.dumps([conversation("hi", "ho")]))
    with pytest.raises(ConfigError, match="no conversation whose question has 4 to 1024 tokens"):
        sharegpt_works(tmp_path / "useless.json", 1, 0)


def test_works_are_values() -> None:
    assert Work("a", 1, 2) == Work("a", 1, 2)
