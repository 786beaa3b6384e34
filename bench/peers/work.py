"""The work that engines are compared at, and what its figures are."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from bench.peers.peer import Answer, PeerError
from bench.workload import random_prompts

Figure = Literal["decode", "output", "prefill"]
Limit = Literal["", "weights", "weights and KV", "products"]


class Work(NamedTuple):
    """One row of the comparison.

    Attributes:
        name: in results and options.
        title: for people.
        num_requests, prompt_len, output_len: put at once, tokens of each.
        figure: which tokens are counted over which time. decode: those after the first, from the first to the last;
            output: all answers' over the whole call; prefill: the prompts' over the whole call.
        limit: what no engine can be faster than: reading the weights, or these and the keys and values, once a token;
            the linear layers' bare products. "": none that is easily told.
        ratio_goal, share_goal: of this engine to the best peer, and to the limit; None where there is none.
    """

    name: str
    title: str
    num_requests: int
    prompt_len: int
    output_len: int
    figure: Figure
    limit: Limit = ""
    ratio_goal: float | None = None
    share_goal: float | None = None

    @property
    def mean_context(self) -> float:
        """Tokens in the cache at a decode step, on average."""
        return self.prompt_len + self.output_len / 2


WORKS = (
    Work("decode_1", "decode, 1 request, context 128 to 384", 1, 128, 256, "decode", "weights", 1.3, 0.8),
    Work("batch_16", "16 requests, 128 + 128 tokens", 16, 128, 128, "output", ratio_goal=1.5),
    Work("batch_64", "64 requests, 128 + 128 tokens", 64, 128, 128, "output", ratio_goal=1.5),
    Work("prefill_1024", "prefill, 1,024 tokens", 1, 1024, 1, "prefill", "products", 1.1, 0.7),
    Work("decode_7000", "decode, 1 request, context 7,000", 1, 7000, 64, "decode", "weights and KV", share_goal=0.7),
)
QUICK = tuple(
    work._replace(num_requests=min(work.num_requests, 3), prompt_len=work.prompt_len // 64, output_len=length)
    for work, length in zip(WORKS, (6, 4, 4, 1, 4), strict=True)
)
GOALS_4_BITS = {"decode_1": 1.2}


def in_four_bits(works: Sequence[Work]) -> list[Work]:
    """The same with goals for 4-bit weights. Their bytes differ from engine to engine, so no limit is shown."""
    return [work._replace(limit="", ratio_goal=GOALS_4_BITS.get(work.name), share_goal=None) for work in works]


def prompts_for(work: Work, turn: int, seed: int) -> list[list[int]]:
    """The prompts of one turn: the same for all engines, new in every turn, so that no prefix cache has seen them."""
    return random_prompts([work.prompt_len] * work.num_requests, seed * 1_000_003 + turn * 1009 + work.prompt_len)


def check(work: Work, prompts: list[list[int]], answer: Answer) -> None:
    """Raises PeerError unless the engine saw these prompts and gave as many tokens as it was asked for."""
    if answer.prompts != prompts:
        raise PeerError("the engine did not get the prompt ids that it was sent")
    lengths = [len(ids) for ids in answer.token_ids]
    if lengths != [work.output_len] * work.num_requests:
        raise PeerError(f"answers have {lengths} tokens instead of {work.output_len} each")


def tokens_per_s(work: Work, answer: Answer) -> float:
    """The work's figure."""
    if work.figure == "decode":
        return work.num_requests * (work.output_len - 1) / (answer.seconds - answer.first_s)
    tokens = work.output_len if work.figure == "output" else work.prompt_len
    return work.num_requests * tokens / answer.seconds


def turn_order(names: Sequence[str], turn: int) -> list[str]:
    """Who comes after whom: each turn begins with the next one, and every other turn goes backwards."""
    shift = turn // 2 % len(names) if names else 0
    order = [*names[shift:], *names[:shift]]
    return order[::-1] if turn % 2 else order


def agreement(mine: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of requests whose first token is the same: bfloat16 rounds differently from engine to engine."""
    return sum(a[0] == b[0] for a, b in zip(mine, theirs, strict=True)) / len(mine)
