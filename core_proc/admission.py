"""What may enter the queue: refuses early, with the figures, what can never run and what there is no room to queue.

A frontend is a program of somebody else's, perhaps of another version, so its numbers are checked here even where it
has checked them too: one wrong token id would be an index outside a table in the worker, and the end for everybody.
"""

import math
from collections.abc import Sequence

import numpy as np

from folovllm.common.messages.frontend_core import EngineCoreRequest, RejectedRequest
from folovllm.common.sampling_params import MAX_N
from folovllm.core_proc.admission_checks import Refused, RequestChecks, as_token_ids, check_range
from folovllm.core_proc.grammar_threads import Grammars
from folovllm.core_proc.request import Request

_MAX_NUMBER = 2**31
_TOKEN_ID_BYTES = 4
_SMALLEST_RETRY_S = 1.0  # HTTP's Retry-After counts whole seconds
_LARGEST_RETRY_S = 60.0  # the estimate is worth little beyond, and room may come sooner
_WEIGHT_OF_THE_NEWEST = 0.1  # in the running mean of the time between two ends


class FinishPace:
    """The running mean of seconds between the ends of two requests: how soon the queue moves by one."""

    def __init__(self) -> None:
        self._mean_s = 0.0
        self._last_s = -1.0

    def note(self, num_finished: int, now_s: float) -> None:
        """`num_finished` requests ended at `now_s`."""
        if self._last_s >= 0:
            interval_s = (now_s - self._last_s) / num_finished
            self._mean_s += _WEIGHT_OF_THE_NEWEST * (interval_s - self._mean_s) if self._mean_s else interval_s
        self._last_s = now_s

    def seconds_until(self, num_finished: int) -> float:
        """An estimate of how long it takes until so many more have ended, between 1 and 60 s."""
        return min(max(self._mean_s * num_finished, _SMALLEST_RETRY_S), _LARGEST_RETRY_S)


class Admission:
    """Turns messages into requests, or into refusals with a reason."""

    def __init__(
        self,
        *,
        max_model_len: int,
        num_valid_token_ids: int,
        num_pool_tokens: int,
        max_num_seqs: int,
        max_num_queued_reqs: int,
        max_num_queued_tokens: int | None,
        logits_processors: Sequence[str] = (),
        grammars: Grammars | None = None,
    ) -> None:
        """Bounds as named.

        `num_pool_tokens`: tokens whose K and V the whole pool holds; `logits_processors`: names that are loaded;
        `grammars`: None if the model has no tokenizer.
        """
        self.grammars = grammars
        self._max_model_len = max_model_len
        self._num_pool_tokens = num_pool_tokens
        self._max_num_seqs = max_num_seqs
        self._max_num_queued_reqs = max_num_queued_reqs
        self._max_num_queued_tokens = max_num_queued_tokens
        self._checks = RequestChecks(
            num_valid_token_ids=num_valid_token_ids, max_num_seqs=max_num_seqs, logits_processors=logits_processors
        )
        self.pace = FinishPace()

    def admit(self, message: EngineCoreRequest, client: int, now_s: float) -> list[Request]:
        """The answers to one prompt, the leader first; `refusal` must have found nothing, max_tokens be at least 1."""
        prompt = np.frombuffer(message.prompt_token_ids, "<i4")
        room = min(self._max_model_len, self._num_pool_tokens + 1) - len(prompt)  # the last token is never cached
        requests: list[Request] = []
        for index in range(message.n):
            requests.append(
                Request(
                    client=client,
                    number=message.number + index,
                    request_id=message.request_id,
                    prompt_token_ids=prompt,
                    sampling=message.sampling,
                    max_tokens=min(message.max_tokens, room),
                    priority=message.priority,
                    stream=message.stream,
                    arrival_s=now_s,
                    sample_index=index,
                    parent=requests[0] if requests else None,
                    cache_salt=message.cache_salt,
                    skip_reading_prefix_cache=message.skip_reading_prefix_cache,
                )
            )
        return requests

    def refusal(
        self,
        message: EngineCoreRequest,
        live_numbers: "dict[int, Request]",
        *,
        num_running: int,
        num_waiting: int,
        num_waiting_tokens: int,
    ) -> RejectedRequest | None:
        """Why the request cannot be taken, None if it can. `live_numbers` are those of the frontend it comes from."""
        try:
            self._check_numbers(message, live_numbers)
            self._check_prompt_length(as_token_ids("prompt_token_ids", message.prompt_token_ids).size)
            self._checks.check(message)
            if message.grammar is not None and self.grammars is None:
                raise Refused("grammar", "the model has no tokenizer.json, so nothing can hold its text to a grammar")
        except Refused as refused:
            return RejectedRequest(message.number, "invalid", str(refused), field=refused.field)
        full = self._queue_full(message, num_running, num_waiting, num_waiting_tokens)
        if full:
            retry_after_s = self.pace.seconds_until(message.n)
            return RejectedRequest(message.number, "queue_full", full, retry_after_s=retry_after_s)
        return None

    def _check_numbers(self, message: EngineCoreRequest, live_numbers: "dict[int, Request]") -> None:
        check_range("n", message.n, 1, MAX_N)
        most = self._max_num_queued_reqs + self._max_num_seqs
        if message.n > most:
            raise Refused("n", f"n={message.n} answers never fit: the engine runs and queues {most} at most")
        check_range("max_tokens", message.max_tokens, 0, math.inf)
        check_range("number", message.number, 0, _MAX_NUMBER - message.n)
        for number in range(message.number, message.number + message.n):
            if number in live_numbers:
                raise Refused("number", f"number {number} is in use by a request that is not finished")

    def _check_prompt_length(self, num_tokens: int) -> None:
        if not num_tokens:
            raise Refused("prompt_token_ids", "the prompt is empty; it needs at least one token")
        if num_tokens >= self._max_model_len:
            raise Refused(
                "prompt_token_ids",
                f"the prompt has {num_tokens} tokens and the model's length (max_model_len) is {self._max_model_len}: "
                "no room is left for a single output token",
            )
        if num_tokens > self._num_pool_tokens:
            raise Refused(
                "prompt_token_ids",
                f"the prompt has {num_tokens} tokens and the whole KV pool holds {self._num_pool_tokens}: "
                "it can never run; a larger pool or a shorter prompt is needed",
            )

    def _queue_full(
        self, message: EngineCoreRequest, num_running: int, num_waiting: int, num_waiting_tokens: int
    ) -> str:
        """Why there is no room in the queue, "" if there is. What can run at once is not counted as waiting."""
        num_waiting_then = num_waiting + message.n - (self._max_num_seqs - num_running)
        if num_waiting_then <= 0:
            return ""
        if num_waiting_then > self._max_num_queued_reqs:
            return f"{num_waiting} requests wait; the queue is bounded at {self._max_num_queued_reqs}"
        bound = self._max_num_queued_tokens
        num_tokens = num_waiting_tokens + len(message.prompt_token_ids) // _TOKEN_ID_BYTES + message.n - 1
        if bound is not None and num_waiting and num_tokens > bound:
            return f"prompts of {num_waiting_tokens} tokens wait; the queue is bounded at {bound} tokens"
        return ""
