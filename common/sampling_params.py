"""Sampling parameters as the user gives them, checked when they are made."""

import math

import msgspec

from folovllm.common.errors import RequestError

GREEDY_TEMPERATURE = 1e-5  # below it the most likely token is taken: dividing by it would say the same, or overflow
MAX_N = 128
MAX_STOP_STRINGS = 256
MAX_STOP_CHARACTERS = 4096
MAX_STOP_TOKEN_IDS = 1024
MAX_TOP_K = 2**31 - 1
MAX_TOKENS = 2**31 - 1

_NEUTRAL: dict[str, object] = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
    "logprobs": None,
    "prompt_logprobs": None,
    "structured_outputs": None,
}


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the tokens of one request are chosen, and when it ends. Names and meaning follow vLLM.

    temperature, top_k, top_p and min_p left at None take the model's `generation_config.json`, and where that is silent
    1.0, -1 (all tokens), 1.0 and 0.0. An explicit value always wins, also 0 and 1.

    Attributes:
        n: number of answers to one prompt, 1 to 128.
        temperature: ≥ 0; 0 is greedy, and so is everything below 1e-5.
        top_k: keep the k most likely tokens; -1 or 0 keep all.
        top_p: keep the most likely tokens whose probabilities add up to top_p, in (0, 1].
        min_p: drop tokens less likely than min_p times the most likely one, in [0, 1].
        seed: any 64-bit integer; None draws one. The same seed, prompt and parameters give the same answer.
        max_tokens: most tokens to generate; None means as many as the model's length allows.
        min_tokens: no stop (end of sequence, stop token, stop string) ends the answer before this many tokens.
        stop: a string or list of strings that end the answer.
        stop_token_ids: token ids that end the answer, besides the model's own end-of-sequence ids.
        ignore_eos: go on past the model's end-of-sequence ids.
        include_stop_str_in_output: keep the stop string at the end of the text.
        skip_special_tokens: leave special tokens out of the text.

    Penalties, logit_bias, allowed_token_ids, bad_words, logprobs, prompt_logprobs and structured_outputs are known by
    name and refused unless they have their neutral value.

    Raises:
        RequestError: a value is out of its range; the message names field, value and range.
    """

    n: int = 1
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: object | None = None

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, MAX_N)
        _check_float("temperature", self.temperature, 0.0, math.inf)
        _check_int("top_k", self.top_k, -1, MAX_TOP_K)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p=0 must be greater than 0 and at most 1; use temperature=0 for greedy", "top_p")
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        _check_int("max_tokens", self.max_tokens, 0, MAX_TOKENS)
        _check_int("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} is greater than max_tokens={self.max_tokens}", "min_tokens"
            )
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            _check_bool(name, getattr(self, name))
        _check_stop(self.stop_list())
        _check_stop_token_ids(self.stop_token_ids)
        for name, neutral in _NEUTRAL.items():
            if getattr(self, name) != neutral:
                raise RequestError(f"{name} is not supported by this version; leave it at {neutral!r}", name)

    def stop_list(self) -> list[str]:
        """`stop` as a list, whichever of its three forms was given."""
        if self.stop is None:
            return []
        if isinstance(self.stop, str):
            return [self.stop]
        if not isinstance(self.stop, list | tuple):
            raise RequestError(f"stop must be a string or a list of strings, not {type(self.stop).__name__}", "stop")
        return list(self.stop)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name}={_shown(value)} must be a whole number", name)
    if not low <= value <= high:
        raise RequestError(f"{name}={_shown(value)} must lie between {low} and {high}", name)


def _check_float(name: str, value: object, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name}={_shown(value)} must be a number", name)
    if not (math.isfinite(value) and low <= value <= high):
        raise RequestError(f"{name}={_shown(value)} must be a finite number between {low} and {high}", name)


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{name}={_shown(value)} must be True or False", name)


def _check_stop(stop: list[str]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise RequestError(f"stop has {len(stop)} strings; at most {MAX_STOP_STRINGS} are allowed", "stop")
    for i, text in enumerate(stop):
        if not isinstance(text, str):
            raise RequestError(f"stop[{i}] must be a string, not {type(text).__name__}", "stop")
        if not text:
            raise RequestError(f"stop[{i}] is empty; a stop string needs at least one character", "stop")
        if len(text) > MAX_STOP_CHARACTERS:
            raise RequestError(f"stop[{i}] has {len(text)} characters; at most {MAX_STOP_CHARACTERS}", "stop")


def _check_stop_token_ids(ids: list[int] | None) -> None:
    if ids is None:
        return
    if not isinstance(ids, list | tuple):
        raise RequestError(f"stop_token_ids must be a list of token ids, not {type(ids).__name__}", "stop_token_ids")
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise RequestError(f"stop_token_ids has {len(ids)} ids; at most {MAX_STOP_TOKEN_IDS}", "stop_token_ids")
    for i, token_id in enumerate(ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise RequestError(f"stop_token_ids[{i}]={_shown(token_id)} must be a token id ≥ 0", "stop_token_ids")


def _shown(value: object) -> str:
    """`value` for an error message, cut so that bad input is never echoed at length."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
