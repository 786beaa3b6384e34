"""Engines by turns, with engines that only say when they were asked."""

import json

import pytest

from bench.peers.peer import Answer, PeerError
from bench.peers.rounds import Rounds
from bench.peers.work import Work

WORKS = (
    Work("decode_1", "one", 1, 4, 3, "decode"),
    Work("batch_16", "some", 2, 4, 3, "output", ratio_goal=1.5),
)


class FakeEngine:
    """Writes its name to `asked`; answers in `seconds`, its tokens being `token`."""

    def __init__(self, name: str, asked: list[tuple[str, int]], seconds: float = 1.0, token: int = 5) -> None:
        self._name = name
        self._asked = asked
        self._seconds = seconds
        self._token = token
        self.failing = False
        self.prompts: list[list[list[int]]] = []

    def ask(self, prompts: list[list[int]], num_tokens: int, timeout_s: float) -> Answer:
        assert timeout_s > 0
        self._asked.append((self._name, len(prompts)))
        self.prompts.append(prompts)
        if self.failing:
            raise PeerError("out of memory")
        return Answer(self._seconds, self._seconds / 2, prompts, [[self._token] * num_tokens for _ in prompts])


@pytest.fixture
def asked() -> list[tuple[str, int]]:
    return []


def test_engines_take_turns_at_each_work(asked: list[tuple[str, int]]) -> None:
    rounds = Rounds({name: FakeEngine(name, asked) for name in ("own", "vllm", "openvino")}, WORKS, seed=0)
    rounds.run(0)
    rounds.run(1)
    names = [name for name, _ in asked]
    assert names == ["own", "vllm", "openvino"] * 2 + ["openvino", "vllm", "own"] * 2
    assert [count for _, count in asked] == [1, 1, 1, 2, 2, 2] * 2


def test_all_engines_get_the_same_prompts_and_new_ones_each_round(asked: list[tuple[str, int]]) -> None:
    engines = {name: FakeEngine(name, asked) for name in ("own", "vllm")}
    rounds = Rounds(engines, WORKS, seed=3)
    rounds.run(0)
    rounds.run(1)
    assert engines["own"].prompts == engines["vllm"].prompts
    assert engines["own"].prompts[0] != engines["own"].prompts[2]


def test_rates_are_kept_for_each_round(asked: list[tuple[str, int]]) -> None:
    rounds = Rounds({"own": FakeEngine("own", asked), "vllm": FakeEngine("vllm", asked, seconds=4.0)}, WORKS, seed=0)
    for turn in range(3):
        rounds.run(turn)
    assert rounds.rates["decode_1"] == {"own": [2 / 0.5] * 3, "vllm": [2 / 2.0] * 3}
    assert rounds.rates["batch_16"] == {"own": [6.0] * 3, "vllm": [1.5] * 3}
    assert rounds.first_token_s["batch_16"]["vllm"] == [2.0] * 3


def test_an_engine_that_fails_at_a_work_is_not_asked_there_again(asked: list[tuple[str, int]]) -> None:
    engines = {name: FakeEngine(name, asked) for name in ("own", "vllm")}
    rounds = Rounds(engines, WORKS[:1], seed=0)
    rounds.run(0)
    engines["vllm"].failing = True
    rounds.run(1)
    engines["vllm"].failing = False
    rounds.run(2)
    assert [name for name, _ in asked].count("vllm") == 2
    assert rounds.failed == {"decode_1": {"vllm": "out of memory"}}
    assert "vllm" not in rounds.rates["decode_1"]
    assert len(rounds.rates["decode_1"]["own"]) == 3


def test_a_wrong_answer_is_a_failure(asked: list[tuple[str, int]]) -> None:
    class OtherPrompts(FakeEngine):
        def ask(self, prompts: list[list[int]], num_tokens: int, timeout_s: float) -> Answer:
            return super().ask(prompts, num_tokens, timeout_s)._replace(prompts=[[0]])

    rounds = Rounds({"vllm": OtherPrompts("vllm", asked)}, WORKS[:1], seed=0)
    rounds.run(0)
    assert "prompt ids" in rounds.failed["decode_1"]["vllm"]
    assert rounds.rates["decode_1"] == {}


def test_the_worker_alone_is_asked_where_its_figure_is_wanted(asked: list[tuple[str, int]]) -> None:
    rounds = Rounds({"own": FakeEngine("own", asked), "bare": FakeEngine("bare", asked)}, WORKS, seed=0)
    rounds.run(0)
    assert "bare" in rounds.rates["decode_1"]
    assert "bare" not in rounds.rates["batch_16"]


def test_the_result_can_be_written_and_says_how_far_engines_agree(asked: list[tuple[str, int]]) -> None:
    engines = {
        "own": FakeEngine("own", asked),
        "vllm": FakeEngine("vllm", asked),
        "bare": FakeEngine("bare", asked, token=6),
    }
    rounds = Rounds(engines, WORKS, seed=0)
    rounds.run(0)
    result = json.loads(json.dumps(rounds.result()))
    assert result["agreement"] == {"vllm": 1.0, "bare": 0.0}
    assert [Work(*row) for row in result["works"]] == list(WORKS)
