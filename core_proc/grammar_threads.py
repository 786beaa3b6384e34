"""Two threads beside the core's loop: one compiles grammars, one moves matchers on and fills masks.

A grammar may take long: a large one to compile, a nasty one for every single token. The loop never waits for the first
and at most 2 ms a turn for the second (masks take some 20 µs); whoever is not done then sits the step out. Both threads
let the loop run while llguidance works. A descriptor becomes readable when something is done that the loop has not
waited for.

Compiled grammars are kept, the last used ones, so that the next request with the same grammar has it at once.
"""

import collections
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from folovllm.common.log import get_logger
from folovllm.common.messages.frontend_core import Grammar
from folovllm.core_proc.grammar import CompiledGrammar, GrammarError, Matcher, Vocabulary
from folovllm.core_proc.request import Request

MAX_KEPT: Final = 64
SETTLE_S: Final = 0.002
_MAX_COMPILE_CPU_S: Final = 10.0
_MAX_TOKEN_CPU_S: Final = 0.25  # a thousand times what masks take; such a grammar would keep other grammars waiting
_JOIN_S: Final = 2.0

logger = get_logger(__name__)


class Compilation(NamedTuple):
    """A grammar that was compiled, or not: `error` says why. `requests` are the answers that wait for it."""

    requests: list[Request]
    error: str = ""


class AnswerGrammar:
    """A request's grammar as the scheduler sees it.

    Attributes:
        mask: the tokens allowed next, as in SchedulerOutput.token_masks; None while it is not known, and at the end.
        request: whose it is.
        matcher: how far it has come; belongs to the thread while `mask` is None.
    """

    def __init__(self, request: Request, matcher: Matcher, advance: "Callable[[AnswerGrammar, int], None]") -> None:
        self.request = request
        self.matcher = matcher
        self.mask: bytes | None = matcher.mask
        self._advance = advance

    def advance(self, token_id: int) -> None:
        """A token is confirmed: until its mask is there the request cannot sample."""
        self.mask = None
        self._advance(self, token_id)

    @property
    def end(self) -> tuple[bool, str]:
        """How it ended: whether the text is complete, and the error if it is not."""
        matcher, least = self.matcher, self.request.sampling.min_tokens
        if matcher.is_complete and matcher.num_tokens < least:
            return False, f"the grammar ended after {matcher.num_tokens} tokens, and min_tokens is {least}"
        return matcher.is_complete, matcher.error


class Grammars:
    """All grammars of an engine; the loop's side of the two threads."""

    def __init__(self, load: Callable[[], Vocabulary], settle_s: float = SETTLE_S) -> None:
        """`load` is called once, in a thread, now: the core waits for its worker anyway."""
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._load = load
        self._settle_s = settle_s
        self._kept: collections.OrderedDict[Grammar, CompiledGrammar | GrammarError] = collections.OrderedDict()
        self._wanted: queue.SimpleQueue[tuple[Grammar, list[Request]] | None] = queue.SimpleQueue()
        self._tokens: queue.SimpleQueue[tuple[AnswerGrammar, int] | None] = queue.SimpleQueue()
        self._is_settled = threading.Condition()
        self._compiled: list[Compilation] = []  # these five under the condition's lock
        self._over: list[AnswerGrammar] = []
        self._num_advancing = 0
        self._num_compiling = 0
        self._loop_went_on = False
        self._threads = [
            threading.Thread(target=self._compile_all, name="grammar-compile", daemon=True),
            threading.Thread(target=self._advance_all, name="grammar-masks", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_compiling(self) -> int:
        """Answers that wait for their grammar."""
        return self._num_compiling

    def compile(self, grammar: Grammar, requests: list[Request]) -> None:
        """Gives each of `requests` its grammar; they come back by `take_compiled`."""
        with self._is_settled:
            self._num_compiling += len(requests)
        self._wanted.put((grammar, requests))

    def take_compiled(self) -> list[Compilation]:
        """What has been compiled since the last call, well or not; the descriptor is quiet again."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return []
        with self._is_settled:
            compiled, self._compiled = self._compiled, []
            self._num_compiling -= sum(len(each.requests) for each in compiled)
        return compiled

    def settle(self) -> list[AnswerGrammar]:
        """Waits a little for masks that are being filled; returns the answers that are over (see AnswerGrammar.end).

        Once it has waited in vain, it does not again before everything has been filled.
        """
        with self._is_settled:
            self._is_settled.wait_for(lambda: not self._num_advancing, 0 if self._loop_went_on else self._settle_s)
            over, self._over = self._over, []
            self._loop_went_on = self._num_advancing > 0
        return over

    def close(self) -> None:
        """Ends the threads, which may be at work for a bounded time."""
        self._wanted.put(None)
        self._tokens.put(None)
        for thread in self._threads:
            thread.join(_JOIN_S)
        if not any(
            thread.is_alive() for thread in self._threads
        ):  # else one would write to whatever gets the number next
            os.close(self.fd)

    def _advance(self, answer: AnswerGrammar, token_id: int) -> None:
        with self._is_settled:
            self._num_advancing += 1
        self._tokens.put((answer, token_id))

    # ---- in the threads ----------------------------------------------------------------------------------------------

    def _compile_all(self) -> None:
        vocabulary = self._vocabulary()
        while (wanted := self._wanted.get()) is not None:
            grammar, requests = wanted
            error = ""
            if not all(request.is_finished for request in requests):  # aborted or timed out in the queue: no work
                compiled = self._compiled_once(grammar, vocabulary)
                if isinstance(compiled, CompiledGrammar):
                    self._equip(requests, compiled)
                else:
                    error = str(compiled)
            with self._is_settled:
                self._compiled.append(Compilation(requests, error))
            os.eventfd_write(self.fd, 1)

    def _compiled_once(self, grammar: Grammar, vocabulary: Vocabulary | GrammarError) -> CompiledGrammar | GrammarError:
        compiled = self._kept.get(grammar)
        if compiled is None:
            compiled = _compiled(grammar, vocabulary)
        self._kept[grammar] = compiled
        self._kept.move_to_end(grammar)
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return compiled

    def _vocabulary(self) -> Vocabulary | GrammarError:
        try:
            return self._load()
        except GrammarError as error:
            return error

    def _equip(self, requests: list[Request], compiled: CompiledGrammar) -> None:
        stop_ids = np.frombuffer(requests[0].sampling.stop_token_ids, "<i4")
        for request in requests:
            request.grammar = AnswerGrammar(request, Matcher(compiled, stop_ids), self._advance)

    def _advance_all(self) -> None:
        while (job := self._tokens.get()) is not None:
            answer, token_id = job
            mask = None if answer.request.is_finished else _next_mask(answer, token_id)
            with self._is_settled:
                answer.mask = mask
                if mask is None:
                    self._over.append(answer)
                self._num_advancing -= 1
                if self._loop_went_on:
                    os.eventfd_write(self.fd, 1)
                if not self._num_advancing:
                    self._loop_went_on = False
                    self._is_settled.notify()


def _compiled(grammar: Grammar, vocabulary: Vocabulary | GrammarError) -> CompiledGrammar | GrammarError:
    if isinstance(vocabulary, GrammarError):
        return vocabulary
    begun_s = time.thread_time()
    try:
        compiled = CompiledGrammar(grammar, vocabulary)
    except GrammarError as error:
        return error
    except BaseException as error:  # a panic in Rust is no Exception, and would end the thread
        logger.exception("a grammar broke its compiler; please report this")
        return GrammarError(f"the compiler failed: {error}")
    taken_s = time.thread_time() - begun_s
    if taken_s > _MAX_COMPILE_CPU_S:
        return GrammarError(f"it takes {taken_s:.1f} s to compile; {_MAX_COMPILE_CPU_S:.0f} s are allowed")
    return compiled


def _next_mask(answer: AnswerGrammar, token_id: int) -> bytes | None:
    begun_s = time.thread_time()
    try:
        mask = answer.matcher.take(token_id)
    except BaseException as error:  # as above
        logger.exception("a grammar failed; please report this")
        answer.matcher.error = f"the grammar failed: {error}"
        return None
    taken_s = time.thread_time() - begun_s
    if taken_s > _MAX_TOKEN_CPU_S and not answer.matcher.is_complete:
        answer.matcher.error = f"the grammar took {taken_s:.2f} s for one token; {_MAX_TOKEN_CPU_S} s are allowed"
        return None
    return mask
