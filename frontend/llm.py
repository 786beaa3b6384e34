"""`LLM`: the synchronous public API. It knows no sockets; `CoreClient` does.

A call puts its requests and then takes what the core reports, for itself and for whatever else is in work (streams that
are open beside it), until its own requests are done. A lock lets one thread do so at a time.
"""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Unpack

from folovllm.common.errors import EngineDeadError, ProtocolError, RequestError
from folovllm.common.messages.frontend_core import EngineCoreOutputs, EngineStats
from folovllm.common.sampling_params import SamplingParams
from folovllm.frontend.batch import Batch
from folovllm.frontend.chat_request import ChatOptions, Conversation, render, render_many
from folovllm.frontend.engine_options import EngineOptions, check_names
from folovllm.frontend.engine_process import close_in_owner
from folovllm.frontend.input_processor import Request
from folovllm.frontend.opening import open_engine
from folovllm.frontend.output_processor import RequestState
from folovllm.frontend.outputs import RequestOutput
from folovllm.frontend.progress import Progress
from folovllm.frontend.prompts import Prompt
from folovllm.frontend.startup_table import StartupReport
from folovllm.frontend.tokenizer import Tokenizer

_STATS_TIMEOUT_S = 10.0  # the core answers within one turn of its loop: one that takes so long does not work


class LLM:
    """A model that answers prompts; starts an engine of its own (a core and a worker process), or uses a running one.

    Use it as a context manager, or call `close()`; an engine of its own also ends with the program, by whatever cause.
    Threads may share an LLM: calls are answered one after another. For many callers at once take `AsyncLLM`, or give
    one `generate` call all the prompts: they are computed together.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        engine: str | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        """Starts the engine and waits until it is ready.

        Args:
            model: a local Hugging Face folder; `demo`, a small model made on first use; or a hub id. With `engine` it
                may be left out; given, it must be what the engine serves.
            tokenizer: where the tokenizer is, if not in the model's folder.
            engine: endpoint of a running engine to use (`folovllm engine MODEL --listen ENDPOINT`).
            options: of an engine of its own, with these defaults: dtype="auto", device="auto", load_format="auto",
                seed=0, max_model_len=None, block_size=16, num_gpu_blocks_override=None, gpu_memory_utilization=0.9,
                kv_cache_memory_gb=None, kv_cache_dtype="auto", max_num_seqs=256, max_num_batched_tokens=2048,
                long_prefill_token_threshold=None, max_num_partial_prefills=None, target_itl_ms=None,
                enable_prefix_caching=True, scheduling_policy="fcfs", pipeline_depth=2, max_num_queued_reqs=100000,
                max_num_queued_tokens=None, max_worker_restarts=10, attention_backend="auto", batch_invariant=False,
                logits_processors=(), cpu_threads=None, trace_file=None, log_interval_s=10.0, log_level=None. Their
                meaning stands at `folovllm.common.config.EngineConfig`.

        Raises:
            TypeError: an option that does not exist.
            ConfigError: an option is wrong, or was given along with `engine`.
            ModelError: the model's folder cannot be used.
            EngineStartError: the engine's processes could not start; the message is the failing process's own.
            EngineDeadError: no engine answers at `engine`.
        """
        check_names(options, "LLM")
        self._open = open_engine(model, tokenizer, engine, options)
        self._finalizer = weakref.finalize(self, close_in_owner, self._open, os.getpid())
        self._lock = threading.RLock()
        self._next_id = 0
        self._next_ticket = 0
        self._stats: dict[int, EngineStats] = {}
        self._busy = False
        self._abandoned: deque[RequestState] = deque()  # of streams that were dropped while a step was under way

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine if it is the LLM's own, else hangs up. May be called again."""
        with self._lock:
            if self._finalizer.alive:
                self._open.outputs.fail_all(EngineDeadError("this LLM was closed"))
                self._finalizer()

    @property
    def startup(self) -> StartupReport:
        """Seconds per phase and bytes per purpose of the start; `startup.table()` prints well."""
        return self._open.startup

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises RequestError where the model has none."""
        if self._open.tokenizer is None:
            raise RequestError("this model has no tokenizer")
        return self._open.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a call without `sampling_params` uses: the model's generation_config.json, else neutral values."""
        return self._open.defaults.sampling_params()

    def get_stats(self) -> EngineStats:
        """The engine's state now: requests running and waiting, blocks free, totals since start.

        Raises:
            EngineDeadError: the engine has ended, or does not answer within 10 seconds.
        """
        return self._ask(self._open.client.ask_stats)

    def reset_prefix_cache(self) -> bool:
        """Forgets what is cached of prompts and answers; requests in work keep their blocks, which nobody finds more.

        Returns:
            Whether nothing is cached now. Requests in work soon change that.

        Raises:
            EngineDeadError: the engine has ended, or does not answer within 10 seconds.
        """
        return self._ask(self._open.client.reset_prefix_cache).num_cached_blocks == 0

    def _ask(self, send: Callable[[int], None]) -> EngineStats:
        """Sends a question with a ticket and waits for the statistics that echo it."""
        with self._lock:
            self._check_open()
            ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
            send(ticket)
            deadline = time.monotonic() + _STATS_TIMEOUT_S
            while ticket not in self._stats:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise EngineDeadError(f"the engine did not answer within {_STATS_TIMEOUT_S:g} s")
                self._step(left)
            return self._stats.pop(ticket)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers all prompts; they are computed together.

        All prompts are checked before any is sent. A call that raises, or is interrupted, leaves nothing in the engine.

        Args:
            prompts: one prompt or a list: a text, a list of token ids, `{"prompt": …}` or `{"prompt_token_ids": …}`;
                the dicts may hold a `"cache_salt"`: only requests with the same one share what is cached of prompts.
            sampling_params: for all, or one for each; None takes the model's defaults.
            use_tqdm: show a progress bar on stderr.
            priority: for all, or one for each; lower runs first where the scheduling policy is "priority".

        Returns:
            One output per prompt, in order.

        Raises:
            RequestError: a prompt or parameter is wrong; the message names it.
            QueueFullError: the engine's queue is full.
            RequestFailedError: a request failed inside the engine.
            EngineDeadError: the engine ended.
        """
        with self._lock:
            self._check_open()
            requests = self._open.inputs.process_many(
                prompts, sampling_params, priority=priority, first_id=self._next_id
            )
            self._next_id += len(requests)
            batch = Batch(requests)
            try:
                with Progress(len(requests), use_tqdm) as progress:
                    while not batch.finished:
                        self._send(batch.next_portion(), batch.states, stream=False)
                        for output in batch.take_finished(self._step() if batch.waits else []):
                            progress.update(output)
            finally:
                self._abort(batch.states)
            return batch.outputs()

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] | None = None,
        **template: Unpack[ChatOptions],
    ) -> list[RequestOutput]:
        """Answers one conversation, or a list of them, as `generate` does.

        Args:
            messages: one conversation (a list of `{"role": …, "content": …}`) or a list of conversations.
            sampling_params: as for `generate`.
            use_tqdm: as for `generate`.
            priority: as for `generate`.
            template: `add_generation_prompt` (True), `continue_final_message` (False), `tools` (None),
                `chat_template_kwargs` (None): further variables of the model's chat template, as
                `{"enable_thinking": False}`; `cache_salt` (None): as in a prompt of `generate`.

        Returns:
            One output per conversation, in order; `prompt` is the rendered conversation.

        Raises:
            RequestError: the model has no chat template, or a message is wrong; otherwise as `generate`.
        """
        prompts = render_many(self._open.chat, messages, template)
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, priority=priority)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> "OutputStream":
        """Answers one prompt bit by bit.

        The request is checked and sent by this call, not by the first `next`. Closing the iterator, or dropping it,
        aborts the request. Several streams may be open at once, and `generate` be called beside them.

        Args:
            prompt: as for `generate`, but one.
            sampling_params: None takes the model's defaults.
            priority: lower runs first where the scheduling policy is "priority".

        Returns:
            An iterator of outputs whose `outputs` hold what is new; texts and token ids join to the whole.

        Raises:
            RequestError: the prompt or a parameter is wrong. The iterator raises what `generate` raises.
        """
        with self._lock:
            self._check_open()
            request = self._open.inputs.process(
                prompt, sampling_params, request_id=str(self._next_id), priority=priority
            )
            self._next_id += 1
            states: list[RequestState] = []
            try:
                self._send([request], states, stream=True)
                return OutputStream(self, states[0])
            except BaseException:
                self._abort(states)
                raise

    def stream_chat(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        **template: Unpack[ChatOptions],
    ) -> "OutputStream":
        """Answers one conversation bit by bit: the arguments of `chat`, the result of `stream`."""
        return self.stream(render(self._open.chat, messages, template), sampling_params, priority=priority)

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise EngineDeadError("this LLM was closed")

    def _send(self, requests: Sequence[Request], states: list[RequestState], *, stream: bool) -> None:
        """Sends requests; each one's state is in `states` before it is sent, so that no interruption can lose it."""
        outputs, client, now = self._open.outputs, self._open.client, time.monotonic()
        messages = []
        for request in requests:
            number = client.allocate(request.params.n, outputs.live)
            state = outputs.add(request, number, stream=stream, now=now)
            states.append(state)
            if not state.finished:
                messages.append(request.for_core(number, stream=state.by_token))
        client.add(messages)

    def _step(self, timeout_s: float | None = None) -> list[RequestState]:
        """Waits for what the core reports next and takes it in; returns the requests that finished by it."""
        self._abort_abandoned()
        self._busy = True
        try:
            finished = []
            for message in self._open.client.receive(timeout_s):
                if isinstance(message, EngineCoreOutputs):
                    ended, to_abort = self._open.outputs.process(message, time.monotonic())
                    self._open.client.abort(to_abort)
                    finished += ended
                elif isinstance(message, EngineStats):
                    self._stats[message.ticket] = message
            return finished
        except (EngineDeadError, ProtocolError) as error:
            failure = self._open.client.give_up(error) if isinstance(error, ProtocolError) else error
            self._open.client.close()  # an engine that still runs drops the requests of this frontend
            self._open.outputs.fail_all(failure)
            raise failure from failure.__cause__
        finally:
            self._busy = False

    def _abort(self, states: Sequence[RequestState]) -> None:
        """Drops what is left of these requests, here and in the core."""
        numbers = [number for state in states for number in self._open.outputs.forget(state)]
        if numbers and self._finalizer.alive:
            self._open.client.abort(numbers)

    def _abort_abandoned(self) -> None:
        while self._abandoned:
            self._abort([self._abandoned.popleft()])

    def _next_delta(self, state: RequestState) -> RequestOutput | None:
        """Waits for a stream's next output; None at its end."""
        with self._lock:
            while True:
                output = state.take_delta()
                if output is not None or state.finished:
                    return output
                self._step()

    def _abandon(self, state: RequestState) -> None:
        """Aborts a stream that was dropped, now or, where a call is under way, as soon as it can."""
        self._abandoned.append(state)
        if self._lock.acquire(blocking=False):
            try:
                if not self._busy:
                    self._abort_abandoned()
            finally:
                self._lock.release()


class OutputStream(Iterator[RequestOutput]):
    """The outputs of one request as they come, from `LLM.stream`. Closed by `close`, as a context, or when dropped."""

    def __init__(self, llm: LLM, state: RequestState) -> None:
        self._llm = llm
        self._state = state
        self._closed = False

    def __next__(self) -> RequestOutput:
        if self._closed:
            raise StopIteration
        try:
            output = self._llm._next_delta(self._state)
        except BaseException:
            self.close()
            raise
        if output is None:
            self._closed = True
            raise StopIteration
        return output

    def close(self) -> None:
        """Aborts the request if it goes on still. May be called again."""
        if not self._closed:
            self._closed = True
            self._llm._abandon(self._state)

    def __enter__(self) -> "OutputStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
