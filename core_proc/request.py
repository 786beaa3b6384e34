"""One answer to one prompt: its states, and the glossary of every counter of tokens in the core.

Counters of a request. Unit: tokens. The owner is the only one who changes it. The same words are used in messages.

    counter      what it counts                                                           owner
    -----------  -----------------------------------------------------------------------  ------------------------------
    prompt       tokens given by the user; never changes                                  Request
    output       tokens generated and confirmed: the answer so far                        SlotTable while it runs
    confirmed    tokens whose values the core has: prompt + output                        SlotTable
    placeholder  tokens that steps in flight will sample; values not here yet             known - confirmed
    known        confirmed + placeholder; the worker has the values of all of them        SlotTable
    computed     tokens whose K and V are in the cache once every submitted step has run  SlotTable
    scheduled    tokens that one step computes for the request                            StepBuilder
    cached       prompt tokens taken over from shared blocks (they count as computed)     Request
    limit        bound of known: prompt + max_tokens, the model's length, the pool        SlotTable

While a request runs:  cached <= computed < known <= limit  and  prompt <= confirmed <= known.
A step that computes the last known token samples: `known` grows by a placeholder, which the step's result confirms. So
`known - computed` is 1 for a request that decodes and more for one that has a prompt (or lost tokens) to go through.
"""

import collections
import dataclasses
import enum
from typing import Final, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.messages.frontend_core import FinishReason
from folovllm.core_proc.block_hash import BlockHash, extend_chain, root_hash

MAX_HISTORY = 32


class RequestStatus(enum.Enum):
    """WAITING → RUNNING ⇄ PREEMPTED, and from each of them to one of the FINISHED states, which are final."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED_STOPPED = "stop"
    FINISHED_LENGTH_CAPPED = "length"
    FINISHED_ABORTED = "abort"
    FINISHED_TIMED_OUT = "timeout"
    FINISHED_ERROR = "error"


_FINISH_REASONS: Final[dict[RequestStatus, FinishReason]] = {
    RequestStatus.FINISHED_STOPPED: "stop",
    RequestStatus.FINISHED_LENGTH_CAPPED: "length",
    RequestStatus.FINISHED_ABORTED: "abort",
    RequestStatus.FINISHED_TIMED_OUT: "timeout",
    RequestStatus.FINISHED_ERROR: "error",
}
_ENDS_FROM_OUTSIDE: Final = frozenset(
    {RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_TIMED_OUT, RequestStatus.FINISHED_ERROR}
)
_TRANSITIONS: Final[dict[RequestStatus, frozenset[RequestStatus]]] = {
    RequestStatus.WAITING: _ENDS_FROM_OUTSIDE | {RequestStatus.RUNNING},
    RequestStatus.RUNNING: frozenset(_FINISH_REASONS) | {RequestStatus.PREEMPTED},
    RequestStatus.PREEMPTED: _ENDS_FROM_OUTSIDE | {RequestStatus.RUNNING, RequestStatus.FINISHED_STOPPED},
}

Tokens = npt.NDArray[np.int32]


class RequestGrammar(Protocol):
    """What the text of an answer is held to, as the scheduler sees it.

    Attributes:
        mask: the tokens allowed next, as in SchedulerOutput.token_masks; None while it is not known, and at the end.
    """

    mask: bytes | None

    def advance(self, token_id: int) -> None:
        """A token is confirmed: `mask` is None until the next one is known."""


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """One answer. Made from plain values; changed by the scheduler only.

    Attributes:
        client: the frontend it came from, a small number given by the core.
        number: the frontend's number for it; unique among that frontend's live requests.
        request_id: the user's name for it, for logs only.
        prompt_token_ids: int32, at least one.
        sampling: what the worker needs to sample it (`sample_index` is put in).
        max_tokens: most output tokens, at least 1.
        priority: lower runs first where the policy is "priority".
        stream: True: every token is reported in the step that confirms it; False: all of them at the end.
        arrival_s: when the core received it. All times are seconds on the caller's clock.
        sample_index: which of the prompt's `n` answers this is.
        parent: for answers after the first: the first one, whose prompt they share while it runs.
        cache_salt: requests share cached blocks only with those of the same salt.
        skip_reading_prefix_cache: its prompt is computed whole, whatever is cached.
        status: its state; changed by `become`.
        slot: its row of the SlotTable while RUNNING, else None.
        arrival_order: counts up over all requests of the scheduler; breaks ties, so that order is total.
        grammar: what its text is held to; set before the scheduler gets it, moved on by confirmed tokens only.
        output_token_ids: output tokens; up to date only while it is not RUNNING.
        waiting_children: answers that wait for this one's prompt to be in the cache.
        can_be_forked: its prompt is in the cache, confirmed: a child may share its blocks.
        block_hashes: names of its first full blocks, as far as they were needed (see `block_hash`).
        num_cached_tokens: prompt tokens taken over from shared blocks when it was first admitted.
        num_prompt_logprobs: prompt tokens whose log probabilities were reported; the first, which has none, counts.
        num_preemptions: how often it was preempted.
        num_crashes: how often it was in flight at the same place when a worker ended (see `isolation`).
        num_tokens_at_crash: its confirmed tokens then.
        stop_token_id: the token of the stop set that ended it, the last of its output; None if none did.
        error: text for FINISHED_ERROR.
        scheduled_at_s, first_token_at_s, finished_at_s: None until then.
    """

    client: int
    number: int
    request_id: str
    prompt_token_ids: Tokens
    sampling: SamplingRow
    max_tokens: int
    priority: int = 0
    stream: bool = False
    arrival_s: float = 0.0
    sample_index: int = 0
    parent: "Request | None" = None
    cache_salt: str = ""
    skip_reading_prefix_cache: bool = False

    status: RequestStatus = dataclasses.field(default=RequestStatus.WAITING, init=False)
    slot: int | None = dataclasses.field(default=None, init=False)
    arrival_order: int = dataclasses.field(default=-1, init=False)
    grammar: RequestGrammar | None = dataclasses.field(default=None, init=False, repr=False)
    output_token_ids: Tokens = dataclasses.field(default_factory=lambda: np.empty(0, np.int32), init=False)
    waiting_children: "list[Request]" = dataclasses.field(default_factory=list, init=False, repr=False)
    can_be_forked: bool = dataclasses.field(default=False, init=False)
    block_hashes: list[BlockHash] = dataclasses.field(default_factory=list, init=False, repr=False)
    num_cached_tokens: int = dataclasses.field(default=0, init=False)
    num_prompt_logprobs: int = dataclasses.field(default=1, init=False)
    num_preemptions: int = dataclasses.field(default=0, init=False)
    num_crashes: int = dataclasses.field(default=0, init=False)
    num_tokens_at_crash: int = dataclasses.field(default=0, init=False)
    stop_token_id: int | None = dataclasses.field(default=None, init=False)
    error: str = dataclasses.field(default="", init=False)
    scheduled_at_s: float | None = dataclasses.field(default=None, init=False)
    first_token_at_s: float | None = dataclasses.field(default=None, init=False)
    finished_at_s: float | None = dataclasses.field(default=None, init=False)
    history: "collections.deque[str]" = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=MAX_HISTORY), init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.prompt_token_ids.size == 0 or self.max_tokens < 1:
            raise ValueError("a request needs at least one prompt token and max_tokens of at least 1")
        if self.sampling.sample_index != self.sample_index:
            # The prompt's log probabilities are the same for all answers: the first one reports them.
            self.sampling = msgspec.structs.replace(self.sampling, sample_index=self.sample_index, prompt_logprobs=None)

    @property
    def reads_prefix_cache(self) -> bool:
        """Whether it may take over computed blocks: not if the log probabilities of the skipped tokens are wanted."""
        return not self.skip_reading_prefix_cache and self.sampling.prompt_logprobs is None

    def name_blocks(self, tokens: bytes, block_bytes: int) -> None:
        """Extends `block_hashes` by the full blocks of `tokens`, int32 bytes that begin where the names end."""
        extend_chain(self.block_hashes, root_hash(self.cache_salt), tokens, block_bytes)

    @property
    def num_prompt_tokens(self) -> int:
        return self.prompt_token_ids.size

    @property
    def num_confirmed_tokens(self) -> int:
        """Prompt and output; not for a RUNNING request, whose output is in the SlotTable."""
        return self.prompt_token_ids.size + self.output_token_ids.size

    @property
    def num_queue_tokens(self) -> int:
        """What it weighs in the bound on waiting tokens: its prompt; a child shares its parent's and adds one token."""
        return self.prompt_token_ids.size if self.parent is None else 1

    @property
    def has_mask(self) -> bool:
        """Whether it may sample: it has no grammar, or knows which tokens come next."""
        return self.grammar is None or self.grammar.mask is not None

    @property
    def is_finished(self) -> bool:
        return self.status in _FINISH_REASONS

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended; only for a finished request."""
        return _FINISH_REASONS[self.status]

    @property
    def queue_s(self) -> float:
        """Seconds from arrival to the first schedule; to the end if it was never scheduled, 0 while it waits."""
        until = self.finished_at_s if self.scheduled_at_s is None else self.scheduled_at_s
        return 0.0 if until is None else until - self.arrival_s

    @property
    def first_token_s(self) -> float:
        """Seconds from arrival to the first token, 0 if there was none."""
        return 0.0 if self.first_token_at_s is None else self.first_token_at_s - self.arrival_s

    @property
    def total_s(self) -> float:
        """Seconds from arrival to the end, 0 before it."""
        return 0.0 if self.finished_at_s is None else self.finished_at_s - self.arrival_s

    def become(self, status: RequestStatus, why: str) -> None:
        """Goes over to `status`.

        Raises:
            ValueError: there is no way from the present state to `status`.
        """
        if status not in _TRANSITIONS.get(self.status, ()):
            raise ValueError(f"no way from {self.status.name} to {status.name}\n{self.describe()}")
        self.note(f"{self.status.name} -> {status.name}: {why}")
        self.status = status

    def note(self, event: str) -> None:
        """Keeps `event` in the bounded history that `describe` shows."""
        self.history.append(event)

    def describe(self) -> str:
        """The request and its last events, for an error that concerns it."""
        head = (
            f"request {self.request_id!r} (client {self.client}, number {self.number}): {self.status.name}, slot "
            f"{self.slot}, {self.num_prompt_tokens} prompt tokens, max_tokens {self.max_tokens}"
        )
        return "\n  ".join([head, *self.history])
