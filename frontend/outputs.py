"""What a caller gets back: plain data, named as vLLM users know it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from folovllm.common.messages.frontend_core import FinishReason


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request: readings of one monotonic clock, in seconds. None: not happened (yet).

    Attributes:
        arrival_time: the frontend took the request.
        first_scheduled_time: the core first gave it tokens to compute.
        first_token_time: its first token reached the frontend.
        last_token_time: the latest token so far reached the frontend.
        finished_time: it ended, for whatever reason.
        num_generation_tokens: tokens generated so far, over all its answers.
        num_preemptions: how often it was thrown out and computed anew.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_generation_tokens: int = 0
    num_preemptions: int = 0

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival to being scheduled first."""
        return _between(self.arrival_time, self.first_scheduled_time)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return _between(self.arrival_time, self.first_token_time)

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds from one token to the next after the first; None below two tokens."""
        span = _between(self.first_token_time, self.last_token_time)
        gaps = self.num_generation_tokens - 1
        return None if span is None or gaps < 1 else span / gaps

    @property
    def total_time(self) -> float | None:
        """Seconds from arrival to the end."""
        return _between(self.arrival_time, self.finished_time)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


@dataclass(slots=True)
class Logprob:
    """The log-probability of one token at one position, its rank (1: most likely), and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One answer to a request; there are `n` of them.

    In a stream (`LLM.stream`, `AsyncLLM.generate`), `text`, `token_ids` and `logprobs` hold what is new since the
    answer's last output, and join to the whole; everywhere else they are the whole.

    Attributes:
        index: which of the `n` answers, from 0.
        text: with special tokens left out and the stop string cut off, unless asked otherwise.
        token_ids: including the token that ended the answer. A text can lag behind its tokens, by an unfinished
            character or by what may yet become a stop string.
        cumulative_logprob: sum of the log-probabilities of all tokens so far; None where none were asked for.
        logprobs: per token, id → log-probability of the token and of the asked number of alternatives.
        finish_reason: None while the answer goes on; "stop": end of sequence, stop token or stop string; "length":
            max_tokens or the model's length; "abort"; "timeout"; "error".
        stop_reason: the stop string or the stop_token_ids entry that ended it; None for an end of sequence.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """Whether this answer has ended."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request and its answers, whole or, in a stream, what is new (see CompletionOutput).

    Attributes:
        request_id: the caller's id of the request.
        prompt: the prompt's text; None where token ids were given.
        prompt_token_ids: what the model was given, special tokens included.
        prompt_logprobs: per prompt token, the first None; None where none were asked for.
        outputs: the answers by index; in a stream those alone that have something new.
        finished: all answers have ended.
        num_cached_tokens: prompt tokens taken from the prefix cache; None as long as it is not known.
        metrics: times and counts of the request; None where it never reached the engine.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int | None = None
    metrics: RequestMetrics | None = None

    def __repr__(self) -> str:
        """Short enough to print a list of them: long prompts and id lists are cut in the middle."""
        answers = "\n".join(f"    {_shown_answer(output)}," for output in self.outputs)
        head = (
            f"RequestOutput(request_id={self.request_id!r}, prompt={_shown(self.prompt)}, "
            f"prompt_token_ids={_shown_ids(self.prompt_token_ids)}, finished={self.finished}, "
            f"num_cached_tokens={self.num_cached_tokens}"
        )
        return f"{head}, outputs=[\n{answers}\n])" if answers else f"{head}, outputs=[])"


def _shown_answer(output: CompletionOutput) -> str:
    return (
        f"CompletionOutput(index={output.index}, text={output.text!r}, token_ids={_shown_ids(output.token_ids)}, "
        f"finish_reason={output.finish_reason!r}, stop_reason={output.stop_reason!r})"
    )


def _shown(text: str | None) -> str:
    return repr(text) if text is None or len(text) <= 200 else f"{text[:100]!r}…{text[-80:]!r}"


def _shown_ids(ids: Sequence[int]) -> str:
    if len(ids) <= 16:
        return str(list(ids))
    ends = ", ".join(map(str, ids[:8])), ", ".join(map(str, ids[-4:]))
    return f"[{ends[0]}, … {len(ids)} ids …, {ends[1]}]"
