"""What the core reports → the callers' RequestOutputs. Pure: time is an argument, nothing is sent.

A request that streams, has stop strings to be searched for or wants log probabilities is reported token by token and
detokenized as it goes; every other one is reported once, at its end, and detokenized at once. Deltas are not made per
step but when the caller takes them, so a slow caller gets fewer, longer ones, and nothing piles up.
"""

from collections.abc import Callable, Iterable

from folovllm.common.errors import (
    EngineDeadError,
    FoloVLLMError,
    ProtocolError,
    QueueFullError,
    RequestError,
    RequestFailedError,
)
from folovllm.common.messages.frontend_core import EngineCoreOutputs, FinishedRequest, FinishReason, RejectedRequest
from folovllm.frontend import int32
from folovllm.frontend.core_frames import logprobs_by_number, tokens_by_number
from folovllm.frontend.detokenizer import Detokenizer, whole_text
from folovllm.frontend.input_processor import Request
from folovllm.frontend.logprobs import Place, TokenLogprobs, places
from folovllm.frontend.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from folovllm.frontend.tokenizer import Tokenizer

# Fields of the core's messages that are not named as the parameters that they were made from.
_USERS_NAMES = {"grammar": "structured_outputs", "bias_token_ids": "logit_bias", "bias_values": "logit_bias"}


class Answer:
    """One of the `n` answers to a request, as far as it is known.

    Attributes:
        logprobs: parallel to token_ids; None where none were asked for.
    """

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer | None, by_token: bool) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._request = request
        self._tokenizer = tokenizer if request.params.detokenize else None
        self.logprobs = None if request.params.logprobs is None else TokenLogprobs(self._tokenizer)
        self._detokenizer = self._make_detokenizer() if by_token else None
        self._text: list[str] = []
        self._taken_tokens = 0
        self._taken_text = 0
        self._end_taken = False

    def _make_detokenizer(self) -> Detokenizer | None:
        if self._tokenizer is None:
            return None
        params = self._request.params
        return Detokenizer(
            self._tokenizer,
            stop=params.stop_list(),
            min_tokens=params.min_tokens,
            include_stop_str_in_output=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
        )

    def push(self, token_ids: list[int], *, ends_with_stop_token: bool) -> bool:
        """Takes tokens of a request that is reported token by token; True if a stop string now ended the answer.

        Raises ProtocolError if one is no token, or if its log probabilities are missing.
        """
        _check_ids(token_ids)
        stopped = self._push(token_ids, ends_with_stop_token)
        if self.logprobs is not None:
            self.logprobs.cut(len(self.token_ids))
        return stopped

    def _push(self, token_ids: list[int], ends_with_stop_token: bool) -> bool:
        if self._request.max_tokens == 0:  # the token that comes with a prompt's log probabilities
            return False
        if self._detokenizer is None:
            self.token_ids += token_ids
            return False
        piece = self._detokenizer.push(token_ids, ends_with_stop_token=ends_with_stop_token)
        if piece:
            self._text.append(piece)
        surplus = len(self.token_ids) + len(token_ids) - self._detokenizer.num_tokens
        self.token_ids += token_ids[: len(token_ids) - surplus]
        if self._detokenizer.stop_reason is None:
            return False
        self.finish_reason, self.stop_reason = "stop", self._detokenizer.stop_reason
        return True

    def end(self, reason: FinishReason, stop_token_id: int | None = None, token_ids: bytes = b"") -> None:
        """Ends the answer. `token_ids`: all of its tokens, if it was not reported token by token.

        Raises ProtocolError if they are none.
        """
        self.finish_reason = reason
        if stop_token_id is not None:
            self.stop_reason = self._request.stop.reason(stop_token_id)
        if token_ids:
            self.token_ids = _check_ids(int32.unpack(token_ids))
            self._text = [self._whole_text(stop_token_id is not None)]
        elif self._detokenizer is not None:
            self._text.append(self._detokenizer.finish())

    def _whole_text(self, ends_with_stop_token: bool) -> str:
        if self._tokenizer is None:
            return ""
        params = self._request.params
        if params.stop:  # each one a special token's text, else it had been searched for
            detokenizer = self._make_detokenizer()
            assert detokenizer is not None
            text = detokenizer.push(self.token_ids, ends_with_stop_token=ends_with_stop_token)
            return text + detokenizer.finish()
        cut = ends_with_stop_token and not params.include_stop_str_in_output
        ids = self.token_ids[:-1] if cut else self.token_ids
        return whole_text(self._tokenizer, ids, skip_special_tokens=params.skip_special_tokens)

    def whole(self) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text="".join(self._text),
            token_ids=self.token_ids,
            cumulative_logprob=None if self.logprobs is None else self.logprobs.cumulative,
            logprobs=None if self.logprobs is None else self.logprobs.made(),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def take_delta(self) -> CompletionOutput | None:
        """What is new; None if there is no new text (or token, for a model without text) and no end."""
        text = "".join(self._text[self._taken_text :])
        new_tokens = self._taken_tokens < len(self.token_ids)
        ended = self.finish_reason is not None and not self._end_taken
        if not (text or ended or (new_tokens and self._tokenizer is None)):
            return None
        delta = CompletionOutput(
            index=self.index,
            text=text,
            token_ids=self.token_ids[self._taken_tokens :],
            cumulative_logprob=None if self.logprobs is None else self.logprobs.cumulative,
            logprobs=None if self.logprobs is None else self.logprobs.made()[self._taken_tokens :],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        self._taken_text, self._taken_tokens = len(self._text), len(self.token_ids)
        self._end_taken = self.finish_reason is not None
        return delta


class RequestState:
    """A request in work and its answers.

    Attributes:
        request: as it was checked.
        first_number: the core's number of answer 0.
        by_token: whether the core is to report every token.
        answers: by index.
        prompt_logprobs: of the prompt's tokens but the first; None where none were asked for.
        error: why the request was refused or failed.
    """

    def __init__(
        self,
        request: Request,
        first_number: int,
        tokenizer: Tokenizer | None,
        *,
        stream: bool,
        now: float,
        on_news: Callable[[], None] | None = None,
    ) -> None:
        self.request = request
        self.first_number = first_number
        self.by_token = stream or bool(request.stop.strings) or request.reports_logprobs
        self.answers = [Answer(i, request, tokenizer, self.by_token) for i in range(request.params.n)]
        wanted = request.params.prompt_logprobs is not None
        self.prompt_logprobs = TokenLogprobs(tokenizer if request.params.detokenize else None) if wanted else None
        self._prompt_logprobs_taken = False
        self.metrics = RequestMetrics(arrival_time=now)
        self.error: FoloVLLMError | None = None
        self._on_news = on_news
        self._num_cached_tokens: int | None = None

    @property
    def finished(self) -> bool:
        """All answers have ended, or the request has failed."""
        return self.error is not None or None not in [answer.finish_reason for answer in self.answers]

    def news(self) -> None:
        """Tells whoever waits that there is something to take."""
        if self._on_news is not None:
            self._on_news()

    def count_tokens(self, count: int, now: float) -> None:
        metrics = self.metrics
        metrics.num_generation_tokens += count
        metrics.last_token_time = now
        if metrics.first_token_time is None:
            metrics.first_token_time = now

    def note_end(self, ended: FinishedRequest | None, now: float) -> None:
        """Updates the metrics by the core's own times; the last answer's end is the request's."""
        self.metrics.finished_time = now
        if ended is None:
            return
        arrival = self.metrics.arrival_time
        if self.metrics.first_scheduled_time is None:
            self.metrics.first_scheduled_time = arrival + ended.queue_s
        if ended.token_ids:
            first = arrival + ended.first_token_s
            self.metrics.first_token_time = min(first, self.metrics.first_token_time or first)
            self.count_tokens(len(ended.token_ids) // 4, now)
        self.metrics.num_preemptions += ended.num_preemptions
        self._num_cached_tokens = max(self._num_cached_tokens or 0, ended.num_cached_tokens)

    def whole(self) -> RequestOutput:
        """The request with everything that is known. Raises the request's error."""
        return self._output([answer.whole() for answer in self.answers], self._all_prompt_logprobs())

    def take_delta(self) -> RequestOutput | None:
        """What is new since the last call, None if nothing is. Raises the request's error."""
        deltas = [delta for answer in self.answers if (delta := answer.take_delta()) is not None]
        if not (deltas or self.error):
            return None
        new = None if self._prompt_logprobs_taken else self._all_prompt_logprobs()  # complete before the first token
        self._prompt_logprobs_taken = True
        return self._output(deltas, new)

    def _all_prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        return None if self.prompt_logprobs is None else [None, *self.prompt_logprobs.made()]

    def _output(
        self, outputs: list[CompletionOutput], prompt_logprobs: list[dict[int, Logprob] | None] | None
    ) -> RequestOutput:
        if self.error is not None:
            raise self.error
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=outputs,
            finished=self.finished,
            num_cached_tokens=self._num_cached_tokens,
            metrics=self.metrics,
        )


class OutputProcessor:
    """The requests that a frontend has in the core.

    Attributes:
        live: number → (request, answer) of every answer that has not ended.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self.live: dict[int, tuple[RequestState, Answer]] = {}

    def add(
        self,
        request: Request,
        first_number: int,
        *,
        stream: bool,
        now: float,
        on_news: Callable[[], None] | None = None,
    ) -> RequestState:
        """Takes over a request that is about to be sent; one that asks for nothing to be computed is finished at once.

        Args:
            request: to be answered.
            first_number: of `n` consecutive numbers that are free.
            stream: the caller wants deltas.
            now: a monotonic clock's time in seconds.
            on_news: called whenever there is something to take.
        """
        state = RequestState(request, first_number, self._tokenizer, stream=stream, now=now, on_news=on_news)
        if request.max_tokens == 0 and state.prompt_logprobs is None:
            for answer in state.answers:
                answer.end("length")
            state.note_end(None, now)
        else:
            self.live |= {first_number + answer.index: (state, answer) for answer in state.answers}
        return state

    def process(self, outputs: EngineCoreOutputs, now: float) -> tuple[list[RequestState], list[int]]:
        """Takes in what a step brought; what is on its way for requests that are gone is passed over.

        What makes no sense for one request fails that request.

        Returns:
            The requests that finished by it, and the numbers that the core must abort (a stop string was found).

        Raises:
            ProtocolError: the message makes no sense, and no single request is to blame; nothing has changed then.
        """
        ended = {entry.number: entry for entry in outputs.finished}
        touched: dict[int, RequestState] = {}
        to_abort = []
        tokens = tokens_by_number(outputs)
        for state in self._take_logprobs(outputs, logprobs_by_number(outputs)):
            touched[id(state)] = state
        for number, token_ids in tokens.items():
            if number not in self.live:
                continue
            state, answer = self.live[number]
            touched[id(state)] = state
            if self._push(state, answer, token_ids, ended.get(number), now):
                del self.live[number]
                if number not in ended:
                    to_abort.append(number)
        touched |= self._end_all(outputs.finished, now)
        for rejected in outputs.rejected:
            touched |= self._reject(rejected)
        for state in touched.values():
            if state.error is not None:
                to_abort += self.forget(state)  # one failed answer fails its request
            state.news()
        return [state for state in touched.values() if state.finished], to_abort

    def _push(
        self, state: RequestState, answer: Answer, token_ids: list[int], end: FinishedRequest | None, now: float
    ) -> bool:
        """Hands an answer its new tokens; True if a stop string now ended it."""
        before = len(answer.token_ids)
        try:
            stopped = answer.push(token_ids, ends_with_stop_token=end is not None and end.stop_token_id is not None)
        except ProtocolError as error:
            _blame(state, error)
            return False
        state.count_tokens(len(answer.token_ids) - before, now)
        if stopped:
            state.note_end(end, now)
        return stopped

    def _take_logprobs(self, outputs: EngineCoreOutputs, placed: Iterable[tuple[int, Place]]) -> list[RequestState]:
        """Hands them to their answers, before the tokens that they belong to; returns requests that failed by it."""
        failed = []
        for part in outputs.prompt_logprobs:
            state, _ = self.live.get(part.number, (None, None))
            if state is not None and state.prompt_logprobs is not None:
                try:
                    state.prompt_logprobs.extend(part.start - 1, places(part.logprobs))
                except ProtocolError as error:
                    _blame(state, error)
                    failed.append(state)
        for number, place in placed:
            _, answer = self.live.get(number, (None, None))
            if answer is not None and answer.logprobs is not None:
                answer.logprobs.append(place)
        return failed

    def _end_all(self, finished: Iterable[FinishedRequest], now: float) -> dict[int, RequestState]:
        touched = {}
        for end in finished:
            if end.number not in self.live:
                continue
            state, answer = self.live.pop(end.number)
            touched[id(state)] = state
            try:
                answer.end(end.finish_reason, end.stop_token_id, end.token_ids)
            except ProtocolError as error:
                _blame(state, error)
            state.note_end(end, now)
            if end.finish_reason == "error":
                state.error = RequestFailedError(f"request {state.request.request_id} failed: {end.error}")
        return touched

    def _reject(self, rejected: RejectedRequest) -> dict[int, RequestState]:
        if rejected.number not in self.live:
            return {}
        state, _ = self.live[rejected.number]
        self.forget(state)
        state.error = _rejection(rejected, state.request.request_id)
        return {id(state): state}

    def end_locally(self, state: RequestState, reason: FinishReason, now: float) -> list[int]:
        """Ends what is left of a request; returns the numbers that the core must abort."""
        numbers = self.forget(state)
        for number in numbers:
            state.answers[number - state.first_number].end(reason)
        if numbers:
            state.note_end(None, now)
            state.news()
        return numbers

    def forget(self, state: RequestState) -> list[int]:
        """Drops what is left of a request without ending it; returns the numbers that the core must abort."""
        numbers = [state.first_number + answer.index for answer in state.answers]
        live = [number for number in numbers if number in self.live and self.live[number][0] is state]
        for number in live:
            del self.live[number]
        return live

    def fail_all(self, error: FoloVLLMError) -> None:
        """The engine is gone: every request that is left has failed."""
        states = {id(state): state for state, _ in self.live.values()}
        self.live.clear()
        for state in states.values():
            state.error = error
            state.news()


def _check_ids(token_ids: list[int]) -> list[int]:
    if min(token_ids, default=0) < 0:  # tokenizers would raise errors of their own
        raise ProtocolError(f"the core sent {min(token_ids)} as a token")
    return token_ids


def _blame(state: RequestState, error: ProtocolError) -> None:
    """Fails the one request that a message makes no sense for."""
    state.error = RequestFailedError(f"request {state.request.request_id} failed: {error}")


def _rejection(rejected: RejectedRequest, request_id: str) -> FoloVLLMError:
    message = f"request {request_id}: {rejected.message}"
    if rejected.kind == "queue_full":
        return QueueFullError(message, rejected.retry_after_s)
    if rejected.kind == "draining":
        return EngineDeadError(message)
    return RequestError(message, _USERS_NAMES.get(rejected.field, rejected.field) or None)
