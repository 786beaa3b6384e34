"""Engines by turns: who is asked when, what is written down, and what happens to one that fails."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from bench.peers.catalog import KINDS
from bench.peers.peer import Answer, PeerError
from bench.peers.work import Work, agreement, check, prompts_for, tokens_per_s, turn_order

BARE_WORKS = ("decode_1", "batch_64")  # what the engine costs is asked for there
_ANSWER_S = 900.0


class Engine(Protocol):
    """Something that answers prompts; `bench.peers.process.PeerProcess` is one."""

    def ask(self, prompts: list[list[int]], num_tokens: int, timeout_s: float) -> Answer: ...


class Rounds:
    """What the engines have done so far.

    Attributes:
        rates: work → engine → tokens/s, one for each round. An engine that failed at a work has none there.
        first_token_s: the same for the seconds until every request had its first token.
        failed: work → engine → why. It is not asked there again.
    """

    def __init__(self, engines: Mapping[str, Engine], works: Sequence[Work], seed: int) -> None:
        self._engines = engines
        self._works = works
        self._seed = seed
        self._agreed: dict[str, list[float]] = {}
        self.rates: dict[str, dict[str, list[float]]] = {work.name: {} for work in works}
        self.first_token_s: dict[str, dict[str, list[float]]] = {work.name: {} for work in works}
        self.failed: dict[str, dict[str, str]] = {work.name: {} for work in works}

    def run(self, turn: int) -> None:
        """Every work by every engine that can do it."""
        for work in self._works:
            prompts = prompts_for(work, turn, self._seed)
            answers: dict[str, Answer] = {}
            for name in turn_order(list(self._engines), turn):
                if name in self.failed[work.name] or (name == "bare" and work.name not in BARE_WORKS):
                    continue
                try:
                    answer = self._engines[name].ask(prompts, work.output_len, _ANSWER_S)
                    check(work, prompts, answer)
                except PeerError as error:
                    self._fail(work, name, error)
                else:
                    answers[name] = answer
            self._note(work, answers)
            rates = {name: round(tokens_per_s(work, answer), 1) for name, answer in answers.items()}
            progress(f"round {turn + 1}, {work.name}: {rates}")

    def result(self) -> dict[str, Any]:
        """All of it as it stands in a result's file."""
        return {
            "works": self._works,
            "rates": self.rates,
            "first_token_s": self.first_token_s,
            "failed": self.failed,
            "agreement": {name: statistics.mean(shares) for name, shares in self._agreed.items()},
        }

    def _fail(self, work: Work, name: str, error: PeerError) -> None:
        self.failed[work.name][name] = str(error)
        self.rates[work.name].pop(name, None)
        self.first_token_s[work.name].pop(name, None)
        progress(f"{KINDS[name].title} fails at {work.name}: {error}")

    def _note(self, work: Work, answers: dict[str, Answer]) -> None:
        for name, answer in answers.items():
            self.rates[work.name].setdefault(name, []).append(tokens_per_s(work, answer))
            self.first_token_s[work.name].setdefault(name, []).append(answer.first_s)
            if "own" in answers and name != "own":
                self._agreed.setdefault(name, []).append(agreement(answers["own"].token_ids, answer.token_ids))


def progress(text: str) -> None:
    """A line that says how far it has come."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
