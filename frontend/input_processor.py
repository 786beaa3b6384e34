"""What a caller gives (prompts, sampling parameters) → checked, resolved requests; nothing is sent here.

Resolved once, here: the prompt's ids, truncated where asked; defaults of the model; the stop set (end-of-sequence ids,
stop_token_ids, and stop strings that are one special token's text); max_tokens against the model's length; the seed,
drawn where none is given, so that a request that is computed again goes on exactly as it would have.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from folovllm.common.errors import RequestError
from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.messages.frontend_core import EngineCoreRequest
from folovllm.common.sampling_params import SamplingParams
from folovllm.frontend import int32
from folovllm.frontend.detokenizer import stop_strings_by_token
from folovllm.frontend.generation_defaults import ModelDefaults
from folovllm.frontend.prompts import Prompt, RenderedChat, as_list, checked_ids, unwrapped
from folovllm.frontend.sampling_row import check_known, prompt_only_row, sampling_row
from folovllm.frontend.tokenizer import Tokenizer

_PRIORITY_LIMIT = 2**31
# Log probabilities of one prompt, all alternatives counted: 32 MiB in the message that brings them at the latest
# together, below the bound on frames by eight times; as `Logprob` objects about 500 MB.
MAX_PROMPT_LOGPROBS = 2**22


@dataclasses.dataclass(frozen=True, slots=True)
class StopRules:
    """Which tokens end an answer, and what is reported as the reason.

    Attributes:
        token_ids: the whole stop set.
        eos_token_ids: those that end the answer without a reason (stop_reason None).
        string_of_token: special token → the stop string that is its text.
        strings: stop strings that the text must be searched for.
    """

    token_ids: tuple[int, ...]
    eos_token_ids: frozenset[int]
    string_of_token: Mapping[int, str]
    strings: tuple[str, ...]

    def reason(self, token_id: int) -> int | str | None:
        """`stop_reason` of an answer that this token of the stop set ended."""
        if token_id in self.eos_token_ids:
            return None
        return self.string_of_token.get(token_id, token_id)


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """A checked request.

    Attributes:
        request_id: the caller's name for it; need not be unique.
        prompt: its text; None where ids were given.
        prompt_token_ids: its ids, at least one.
        params: the sampling parameters as given.
        sampling: the same, resolved for the worker.
        stop: what ends an answer.
        max_tokens: most output tokens of an answer, the model's length counted in; 0 asks for nothing to be generated.
        priority: lower runs first, where the engine's policy is "priority".
        cache_salt: only requests with the same one share cached blocks.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    sampling: SamplingRow
    stop: StopRules
    max_tokens: int
    priority: int = 0
    cache_salt: str = ""

    @property
    def reports_logprobs(self) -> bool:
        """Whether the core must report every step, as log probabilities come with their tokens alone."""
        return self.params.logprobs is not None or self.params.prompt_logprobs is not None

    def for_core(self, number: int, *, stream: bool) -> EngineCoreRequest:
        """The message that asks the core to answer it."""
        params = self.params
        generates = self.max_tokens > 0  # else only the prompt's log probabilities are wanted
        return EngineCoreRequest(
            number=number,
            request_id=self.request_id,
            prompt_token_ids=int32.pack(self.prompt_token_ids),
            sampling=self.sampling,
            max_tokens=max(1, self.max_tokens),
            n=params.n,
            priority=self.priority,
            stream=stream,
            timeout_s=params.timeout_s,
            grammar=params.structured_outputs.to_grammar() if params.structured_outputs and generates else None,
            cache_salt=self.cache_salt,
            skip_reading_prefix_cache=bool(params.skip_reading_prefix_cache) or params.prompt_logprobs is not None,
        )


# Parameters (held, so that their identity stays theirs), their stop set, and their row without a seed.
_Resolved = tuple[SamplingParams, StopRules, SamplingRow]


class InputProcessor:
    """Checks and resolves requests for one engine. Holds no state but the source of seeds."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        defaults: ModelDefaults,
        *,
        max_model_len: int,
        num_valid_token_ids: int,
        seeds: random.Random,
    ) -> None:
        """Args:
        tokenizer: None: the model has none; then prompts are token ids only, and stop strings are refused.
        defaults: of the model.
        max_model_len: longest prompt + output in tokens.
        num_valid_token_ids: ids are below this.
        seeds: where seeds are drawn for requests that bring none.
        """
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._max_model_len = max_model_len
        self._num_ids = num_valid_token_ids
        self._seeds = seeds

    def process(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        *,
        request_id: str,
        priority: int = 0,
    ) -> Request:
        """One request. Raises RequestError, naming the field at fault.

        Args:
            prompt: text or token ids, bare or in a dict.
            params: None takes the model's defaults.
            request_id: name of the request for logs and output.
            priority: lower runs first.
        """
        return self._process(prompt, self._checked_params(params), _checked_name(request_id), priority, {})

    def _process(
        self, prompt: Prompt, params: SamplingParams, request_id: str, priority: int, resolved: dict[int, _Resolved]
    ) -> Request:
        """`resolved`: by identity, parameters that other requests of the same call have brought."""
        given, salt = unwrapped(prompt)
        text, ids = self._prompt_ids(given, rendered=isinstance(prompt, RenderedChat))
        ids = self._truncated(ids, params)
        max_tokens = self._max_tokens(params, len(ids))
        self._check_prompt_logprobs(params.prompt_logprobs, len(ids))
        if id(params) not in resolved:
            resolved[id(params)] = self._resolve(params)
        _, stop, row = resolved[id(params)]
        seed = self._seeds.getrandbits(64) - 2**63 if params.seed is None else params.seed
        if max_tokens == 0:
            row = prompt_only_row(row)
        return Request(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=ids,
            params=params,
            sampling=msgspec.structs.replace(row, seed=seed),
            stop=stop,
            max_tokens=max_tokens,
            priority=_checked_priority(priority),
            cache_salt=salt,
        )

    def process_many(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        priority: int | Sequence[int] | None = None,
        first_id: int = 0,
    ) -> list[Request]:
        """All requests of one call; the first that is wrong refuses all, so nothing has been sent then.

        A list of ints is one prompt, any other list is a list of prompts. Requests are named by numbers, `first_id` on.

        Raises:
            RequestError: names the prompt by its place in the list, and the field.
        """
        many, all_prompts = as_list(prompts)
        given = self._checked_params(None) if params is None else params
        all_params = _one_each(given, len(all_prompts), "sampling_params", SamplingParams)
        priorities = _one_each(priority, len(all_prompts), "priority", int)
        resolved: dict[int, _Resolved] = {}
        requests = []
        for i, prompt in enumerate(all_prompts):
            try:
                own_params = self._checked_params(all_params[i])
                own_priority = 0 if priorities[i] is None else priorities[i]
                requests.append(self._process(prompt, own_params, str(first_id + i), own_priority, resolved))
            except RequestError as error:
                raise RequestError(f"prompts[{i}]: {error}" if many else str(error), error.field) from error
        return requests

    def _checked_params(self, params: SamplingParams | None) -> SamplingParams:
        if params is None:
            return self._defaults.sampling_params()
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"sampling_params must be a SamplingParams, not {type(params).__name__}", "sampling_params"
            )
        return params

    def _prompt_ids(self, given: Any, *, rendered: bool) -> tuple[str | None, list[int]]:
        if not isinstance(given, str):
            return None, checked_ids(given, self._num_ids)
        if not given:
            raise RequestError("prompt is empty: it needs at least one character", "prompt")
        if self._tokenizer is None:
            raise RequestError("this model has no tokenizer: give prompt_token_ids instead of text", "prompt")
        ids = self._tokenizer.encode(given, add_special_tokens=not rendered)
        if not ids:
            raise RequestError(f"the tokenizer makes no token of prompt {given[:80]!r}", "prompt")
        return given, ids

    def _truncated(self, ids: list[int], params: SamplingParams) -> list[int]:
        """The end of the prompt, where the request allows its beginning to be cut off."""
        keep = params.truncate_prompt_tokens
        if keep is None:
            return ids
        longest = self._max_model_len - 1
        if keep > longest:
            raise RequestError(
                f"truncate_prompt_tokens={keep} must be -1 or lie between 1 and {longest} (max_model_len - 1)",
                "truncate_prompt_tokens",
            )
        return ids[-keep:] if keep > 0 else ids[-max(1, self._max_model_len - max(1, params.min_tokens)) :]

    def _check_prompt_logprobs(self, asked: int | None, num_prompt_tokens: int) -> None:
        if asked is None:
            return
        each = 1 + (self._num_ids if asked == -1 else asked)
        total = (num_prompt_tokens - 1) * each
        if total > MAX_PROMPT_LOGPROBS:
            raise RequestError(
                f"prompt_logprobs={asked} of {num_prompt_tokens} tokens are {total} log probabilities; at most "
                f"{MAX_PROMPT_LOGPROBS} are allowed for one prompt",
                "prompt_logprobs",
            )

    def _stop_rules(self, params: SamplingParams) -> StopRules:
        strings = params.stop_list()
        if strings and self._tokenizer is None:
            raise RequestError("this model has no tokenizer: give stop_token_ids instead of stop strings", "stop")
        by_token: dict[int, str] = {}
        if strings and self._tokenizer is not None:
            by_token = stop_strings_by_token(self._tokenizer, strings, params.skip_special_tokens)
        user_ids = params.stop_token_ids or []
        check_known("stop_token_ids", user_ids, self._num_ids)
        eos = () if params.ignore_eos else self._defaults.eos_token_ids
        return StopRules(
            token_ids=tuple(dict.fromkeys([*(i for i in eos if i < self._num_ids), *user_ids, *by_token])),
            eos_token_ids=frozenset(eos),
            string_of_token=by_token,
            strings=tuple(text for text in strings if text not in by_token.values()),
        )

    def _resolve(self, params: SamplingParams) -> _Resolved:
        if params.structured_outputs is not None and self._tokenizer is None:
            raise RequestError("this model has no tokenizer: there is no text to constrain", "structured_outputs")
        stop = self._stop_rules(params)
        row = sampling_row(
            params,
            self._defaults,
            stop_token_ids=stop.token_ids,
            tokenizer=self._tokenizer,
            num_ids=self._num_ids,
        )
        return params, stop, row

    def _max_tokens(self, params: SamplingParams, num_prompt_tokens: int) -> int:
        room = self._max_model_len - num_prompt_tokens
        if room < 1:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens, which leaves no room for an answer: prompt and answer "
                f"together may have {self._max_model_len} (max_model_len)",
                "prompt",
            )
        if params.min_tokens > room:
            raise RequestError(
                f"min_tokens={params.min_tokens} does not fit: the prompt has {num_prompt_tokens} tokens, and prompt "
                f"and answer together may have {self._max_model_len} (max_model_len)",
                "min_tokens",
            )
        return room if params.max_tokens is None else min(params.max_tokens, room)


def _one_each(given: Any, count: int, name: str, kind: type) -> Sequence[Any]:
    """`given` as a list of `count`: repeated where it is one, as it is where it is a list of that length."""
    if given is None or isinstance(given, kind):
        return [given] * count
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise RequestError(f"{name} must be one {kind.__name__} or a list of them, not {type(given).__name__}", name)
    if len(given) != count:
        raise RequestError(f"{name} has {len(given)} entries for {count} prompts; give one, or one for each", name)
    return given


def _checked_name(request_id: Any) -> str:
    """What cannot be written into a message must not reach the core: it refuses the whole frame."""
    if not isinstance(request_id, str):
        raise RequestError(f"request_id must be a string, not {type(request_id).__name__}", "request_id")
    try:
        request_id.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"request_id holds half of a character: {error}", "request_id") from error
    return request_id


def _checked_priority(priority: Any) -> int:
    if (
        isinstance(priority, bool)
        or not isinstance(priority, int)
        or not -_PRIORITY_LIMIT <= priority < _PRIORITY_LIMIT
    ):
        raise RequestError(f"priority must be a whole number of 32 bits, not {str(priority)[:40]!r}", "priority")
    return priority
