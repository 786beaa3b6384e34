"""The work, what its figures count, and who begins."""

import pytest

from bench.peers import work as w
from bench.peers.peer import Answer, PeerError

ONE = w.Work("one", "one request", 1, 3, 5, "decode")


def answer(seconds: float = 2.0, first_s: float = 0.0, prompts: int = 1, tokens: int = 5) -> Answer:
    return Answer(seconds, first_s, [[7, 8, 9]] * prompts, [[1] * tokens] * prompts)


def test_decode_counts_the_tokens_after_the_first() -> None:
    assert w.tokens_per_s(ONE, answer(seconds=2.5, first_s=0.5)) == pytest.approx(4 / 2.0)


def test_output_counts_all_answers_over_the_whole_call() -> None:
    work = ONE._replace(figure="output", num_requests=3)
    assert w.tokens_per_s(work, answer(seconds=2.5, first_s=0.5)) == pytest.approx(15 / 2.5)


def test_prefill_counts_the_prompts_over_the_whole_call() -> None:
    work = ONE._replace(figure="prefill", output_len=1)
    assert w.tokens_per_s(work, answer(seconds=1.5, first_s=1.4)) == pytest.approx(3 / 1.5)


def test_four_bits_have_one_goal_and_no_limit() -> None:
    works = w.in_four_bits(w.WORKS)
    assert [work.name for work in works] == [work.name for work in w.WORKS]
    assert {work.name: work.ratio_goal for work in works if work.ratio_goal} == {"decode_1": 1.2}
    assert not any(work.limit or work.share_goal for work in works)


def test_prompts_are_the_same_for_all_and_new_in_every_turn() -> None:
    work = w.WORKS[1]
    prompts = w.prompts_for(work, turn=0, seed=0)
    assert prompts == w.prompts_for(work, turn=0, seed=0)
    assert [len(prompt) for prompt in prompts] == [work.prompt_len] * work.num_requests
    others = [w.prompts_for(work, turn, seed) for turn, seed in ((1, 0), (0, 1), (-1, 0))]
    assert all(each[0][:4] != prompts[0][:4] for each in others)


def test_works_of_one_turn_share_no_prompt() -> None:
    beginnings = {tuple(prompt[:8]) for work in w.WORKS for prompt in w.prompts_for(work, 0, 0)}
    assert len(beginnings) >= sum(work.num_requests for work in w.WORKS) - 17  # of equal lengths: 1, 16 and 64


def test_an_answer_must_be_to_the_prompts_that_were_sent() -> None:
    w.check(ONE, [[7, 8, 9]], answer())
    with pytest.raises(PeerError, match="did not get the prompt ids"):
        w.check(ONE, [[7, 8, 10]], answer())


def test_an_answer_must_have_its_length() -> None:
    with pytest.raises(PeerError, match=r"answers have \[4\] tokens instead of 5"):
        w.check(ONE, [[7, 8, 9]], answer(tokens=4))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_everyone_begins_equally_often_and_comes_last_equally_often(count: int) -> None:
    names = [f"engine {i}" for i in range(count)]
    orders = [w.turn_order(names, turn) for turn in range(2 * count)]
    assert all(sorted(order) == names for order in orders)
    for place in (0, -1):
        assert sorted(order[place] for order in orders) == sorted(names * 2)


def test_no_engine_has_no_order() -> None:
    assert w.turn_order([], 3) == []


def test_agreement_looks_at_first_tokens() -> None:
    assert w.agreement([[1, 2], [3, 4]], [[1, 9], [5, 4]]) == 0.5


def test_quick_works_are_the_same_works_smaller() -> None:
    assert [work.name for work in w.QUICK] == [work.name for work in w.WORKS]
    assert all(work.num_requests * (work.prompt_len + work.output_len) < 200 for work in w.QUICK)
    assert all(
        (quick.figure, quick.limit) == (work.figure, work.limit) for quick, work in zip(w.QUICK, w.WORKS, strict=True)
    )


def test_the_mean_context_lies_between_first_and_last() -> None:
    assert w.WORKS[0].mean_context == 256
