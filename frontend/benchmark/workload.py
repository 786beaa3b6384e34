"""What is asked: prompts and lengths, the same ones for the same seed.

Prompts are made of common English words, each of which is one token in nearly every vocabulary, so no tokenizer is
needed to give them a length. What the server has counted stands in the figures.
"""

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from folovllm.common.errors import ConfigError

_WORDS = """
about after again air all also always another any around away back because before below between both boy book call
came can change children city come could country course day did different does down each earth eat end enough even
every eye face family far father few find first follow food form found four from get give good great group grow had
hand hard have head help her here high him his home house how idea into just keep kind know land large last later
learn leave left letter life light like line list little live long look made make man many may mean men might mile
money more most mother mountain move much music must name near need never new next night number off often old once
one only open other our out over own page paper part people place plant play point put question quick read really
right river run said same saw say school sea second see seem sentence set she should show side small some song soon
sound spell stand start state still stop story study such take talk tell than that their them then there these they
thing think this those thought three through time together took tree try turn two under until very walk want watch
water way well went were what when where which while white who why will with without word work world would write
year you young your
"""
WORDS = tuple(_WORDS.split())
CHARACTERS_PER_TOKEN = 4  # of English text, where no tokenizer counts
MIN_TOKENS, MAX_PROMPT_TOKENS, MAX_TOKENS = 4, 1024, 2048  # conversations outside are left out, as vLLM does

# Mean lengths of ShareGPT's conversations as the PagedAttention paper reports them (Kwon et al. 2023, figure 11). The
# spread is ours: a log-normal one whose longest prompts and answers are about ten times as long as its middle ones.
SHAREGPT_MEAN_PROMPT, SHAREGPT_MEAN_OUTPUT = 161.31, 337.99
SHAREGPT_SIGMA_PROMPT, SHAREGPT_SIGMA_OUTPUT = 1.0, 0.8

CountTokens = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Work:
    """One request that is to be sent.

    Attributes:
        prompt: its text.
        prompt_len: tokens that the text is meant to have, without those of a chat template.
        output_len: most tokens of the answer.
    """

    prompt: str
    prompt_len: int
    output_len: int


@dataclass(frozen=True, slots=True)
class RandomLengths:
    """Lengths around two middles.

    Attributes:
        input_len, output_len: tokens of prompt and answer.
        range_ratio: each length is drawn from middle · (1 ± range_ratio), evenly; in [0, 1).
        prefix_len: tokens that all prompts begin with, besides.
    """

    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0
    prefix_len: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.range_ratio < 1.0:
            raise ConfigError(f"range ratio {self.range_ratio} must lie in [0, 1)")
        for name, value, low in (
            ("input", self.input_len, 1),
            ("output", self.output_len, 1),
            ("prefix", self.prefix_len, 0),
        ):
            if value < low:
                raise ConfigError(f"{name} length {value} must be at least {low}")


def random_works(count: int, lengths: RandomLengths, seed: int) -> list[Work]:
    """Prompts of random words."""
    generator = np.random.default_rng(seed)
    prefix = _words(lengths.prefix_len, generator)
    prompts = _around(lengths.input_len, lengths.range_ratio, count, generator)
    outputs = _around(lengths.output_len, lengths.range_ratio, count, generator)
    return [
        Work(" ".join([*prefix, *_words(prompt, generator)]), lengths.prefix_len + prompt, output)
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def _around(middle: int, ratio: float, count: int, generator: np.random.Generator) -> list[int]:
    low, high = max(1, round(middle * (1 - ratio))), round(middle * (1 + ratio))
    return [int(length) for length in generator.integers(low, high, count, endpoint=True)]


def _words(count: int, generator: np.random.Generator) -> list[str]:
    return [WORDS[i] for i in generator.integers(0, len(WORDS), count)]


def sharegpt_like_works(count: int, seed: int) -> list[Work]:
    """Prompts of random words with lengths distributed like those of ShareGPT's conversations."""
    generator = np.random.default_rng(seed)
    works: list[Work] = []
    while len(works) < count:
        prompt = _log_normal(SHAREGPT_MEAN_PROMPT, SHAREGPT_SIGMA_PROMPT, generator)
        output = _log_normal(SHAREGPT_MEAN_OUTPUT, SHAREGPT_SIGMA_OUTPUT, generator)
        if _is_usable(prompt, output):
            works.append(Work(" ".join(_words(prompt, generator)), prompt, output))
    return works


def _log_normal(mean: float, sigma: float, generator: np.random.Generator) -> int:
    return round(float(generator.lognormal(np.log(mean) - sigma**2 / 2, sigma)))


def _is_usable(prompt: int, output: int) -> bool:
    return MIN_TOKENS <= prompt <= MAX_PROMPT_TOKENS and MIN_TOKENS <= output <= MAX_TOKENS - prompt


class _Turn(msgspec.Struct):
    value: str


class _Conversation(msgspec.Struct):
    conversations: list[_Turn] = []


def sharegpt_works(
    path: pathlib.Path, count: int, seed: int, *, output_len: int | None = None, count_tokens: CountTokens | None = None
) -> list[Work]:
    """First questions of conversations in a file of ShareGPT's form, in an order that the seed decides.

    Args:
        path: a JSON list of `{"conversations": [{"from": …, "value": …}, …]}`.
        count: how many; a file with fewer is gone through again.
        seed: of the order.
        output_len: of every answer; None: as long as the answer in the file.
        count_tokens: None estimates 4 characters a token.

    Raises:
        ConfigError: the file cannot be read, or no conversation in it is of use.
    """
    try:
        conversations = msgspec.json.decode(path.read_bytes(), type=list[_Conversation])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--dataset-path {path} cannot be read as ShareGPT's conversations: {error}") from error
    pairs = [each.conversations[:2] for each in conversations if len(each.conversations) >= 2]
    works: list[Work] = []
    for i in np.random.default_rng(seed).permutation(len(pairs)):
        work = _work_of(pairs[int(i)], output_len, count_tokens or _estimate)
        if _is_usable(work.prompt_len, work.output_len):
            works.append(work)
        if len(works) == count:
            return works
    if not works:
        raise ConfigError(
            f"--dataset-path {path} has no conversation whose question has {MIN_TOKENS} to {MAX_PROMPT_TOKENS} tokens "
            f"and whose question and answer have at most {MAX_TOKENS}"
        )
    return [works[i % len(works)] for i in range(count)]


def _work_of(pair: Sequence[_Turn], output_len: int | None, count_tokens: CountTokens) -> Work:
    question, answer = (turn.value for turn in pair)
    return Work(question, count_tokens(question), count_tokens(answer) if output_len is None else output_len)


def _estimate(text: str) -> int:
    return max(1, round(len(text) / CHARACTERS_PER_TOKEN))
