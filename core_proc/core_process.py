"""The life of the core process: configured, engine built, loop, end; and what is told to whom when it fails."""

import pathlib
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import zmq

import folovllm
from folovllm.common.child_process import ParentWatch
from folovllm.common.config import EngineConfig
from folovllm.common.errors import ConfigError, EngineStartError, FoloVLLMError
from folovllm.common.log import get_logger, setup_logging
from folovllm.common.messages.frontend_core import Welcome
from folovllm.common.messages.lifecycle import (
    ConfigureCore,
    ConfigureWorker,
    CoreReady,
    Failed,
    PhaseTime,
    WorkerReady,
)
from folovllm.common.model_config import read_model_config
from folovllm.common.stop_signals import StopRequested
from folovllm.common.trace_file import TRACE_VERSION, TraceHeader, TraceWriter
from folovllm.common.transport import Authenticator, bind, new_socket, remove_socket_file
from folovllm.core_proc.admission import Admission
from folovllm.core_proc.block_pool import BlockPool
from folovllm.core_proc.early_start import EarlyStart
from folovllm.core_proc.engine_core import EngineCore
from folovllm.core_proc.executor import Executor, WorkerFailedError
from folovllm.core_proc.frontends import MAX_KEPT_FRAMES, Frontends
from folovllm.core_proc.grammar import Vocabulary
from folovllm.core_proc.grammar_threads import Grammars
from folovllm.core_proc.kv_cache_manager import KVCacheManager
from folovllm.core_proc.observer import Observer
from folovllm.core_proc.parent_link import ParentLink
from folovllm.core_proc.recovery import Recovery
from folovllm.core_proc.request_queue import RequestQueue
from folovllm.core_proc.scheduler import ChunkBounds, Scheduler
from folovllm.core_proc.supervisor import Supervisor
from folovllm.core_proc.tracing import FileSink
from folovllm.core_proc.waiter import Waiter

_WORKER_GRACE_S = 2.0  # from the request to end to SIGKILL
_LINGER_MS = 500  # the last frames, such as a Failed, have so long to leave

logger = get_logger(__name__)


class CoreProcess:
    """Builds one engine, runs it and takes it down again, whatever ends it."""

    def __init__(
        self,
        parent: ParentLink,
        waiter: Waiter,
        *,
        name: str,
        early: EarlyStart,
        watch: ParentWatch | None,
    ) -> None:
        self._parent = parent
        self._waiter = waiter
        self._name = name
        self._early = early
        self._watch = watch
        self._imported_at = time.time()
        self._phases: list[PhaseTime] = []
        self._context = early.context
        self._runtime_dirs: set[pathlib.Path] = set()
        self._endpoint = ""  # where frontends are served
        self._socket: zmq.Socket[bytes] | None = None
        self._authenticator: Authenticator | None = None
        self._executor: Executor | None = None
        self._frontends: Frontends | None = None
        self._grammars: Grammars | None = None
        self._sink: FileSink | None = None

    def run(self) -> int:
        """From the Hello to the last clean-up; returns the exit code."""
        try:
            self._remove_at_end(self._early.runtime_dir)
            if self._early.worker is not None:
                self._executor = Executor(self._early.worker)
            self._start(self._parent.ask_configuration(self._context)).run()
        except StopRequested as stop:
            logger.debug("%s", stop)
            return stop.exit_code
        except WorkerFailedError as error:
            self._tell(error.report)
        except Exception as error:
            if not isinstance(error, FoloVLLMError):  # those say all there is to say in their message
                logger.exception("the core failed")
            text = "".join(traceback.format_exception(error))
            self._tell(Failed(self._name, type(error).__name__, str(error), text))
        finally:
            self._close()
        return 1

    def _start(self, configure: ConfigureCore) -> EngineCore:
        config = configure.config
        setup_logging(self._name, config.log_level)
        self._remove_at_end(pathlib.Path(configure.runtime_dir))
        early = self._early
        origin = configure.started_at or early.started_at
        begun, done = early.started_at - origin, early.started_at + early.seconds
        self._phases.append(PhaseTime(self._name, "start the worker", begun, early.seconds))
        self._phases.append(PhaseTime(self._name, "import", done - origin, self._imported_at - done))
        with self._phase("check the model, listen", origin):
            max_model_len, num_valid_token_ids = _resolve_limits(config)
            endpoint = self._listen(configure.listen or f"ipc://{configure.runtime_dir}/frontends")
        if self._executor is None:
            raise EngineStartError(f"cannot start the worker process: {early.failure}") from early.failure
        self._start_grammars(pathlib.Path(config.model), num_valid_token_ids)
        ready = self._executor.start(self._waiter, ConfigureWorker(config, 0, max_model_len, configure.started_at))
        with self._phase("build the scheduler", origin):
            engine = self._build(config, ready, max_model_len, num_valid_token_ids)
        self._parent.send(CoreReady(endpoint, [*self._phases, *ready.phases], ready.memory))
        return engine

    def _start_grammars(self, folder: pathlib.Path, num_valid_token_ids: int) -> None:
        """Reads the vocabulary while the worker starts: later it would stop the loop for up to a second."""
        if (folder / "tokenizer.json").is_file():
            self._grammars = Grammars(lambda: Vocabulary.from_folder(folder, num_valid_token_ids))
            self._waiter.add(self._grammars.fd)

    @contextmanager
    def _phase(self, phase: str, origin: float) -> Iterator[None]:
        begun = time.time()
        yield
        self._phases.append(PhaseTime(self._name, phase, begun - origin, time.time() - begun))

    def _listen(self, endpoint: str) -> str:
        self._socket = new_socket(self._context, zmq.ROUTER)
        self._socket.setsockopt(zmq.SNDHWM, MAX_KEPT_FRAMES)
        self._endpoint, self._authenticator = bind(self._socket, endpoint)
        return self._endpoint

    def _build(
        self, config: EngineConfig, ready: WorkerReady, max_model_len: int, num_valid_token_ids: int
    ) -> EngineCore:
        assert self._executor is not None
        assert self._socket is not None
        pool = BlockPool(ready.num_blocks)
        manager = KVCacheManager(pool, config.block_size, enable_prefix_caching=config.enable_prefix_caching)
        _log_pool(manager.capacity_tokens, config.block_size, max_model_len)
        scheduler = _scheduler(config, manager, max_model_len)
        welcome = _welcome(config, ready, manager, max_model_len, num_valid_token_ids)
        self._frontends = Frontends(self._socket, welcome)
        self._waiter.add(self._socket)
        admission = Admission(
            max_model_len=max_model_len,
            num_valid_token_ids=num_valid_token_ids,
            num_pool_tokens=manager.capacity_tokens,
            max_num_seqs=config.max_num_seqs,
            max_num_queued_reqs=config.max_num_queued_reqs,
            max_num_queued_tokens=config.max_num_queued_tokens,
            logits_processors=config.logits_processors,
            grammars=self._grammars,
        )
        observer = Observer(
            scheduler=scheduler,
            pool=pool,
            frontends=self._frontends,
            executor=self._executor,
            log_interval_s=config.log_interval_s,
            sink=self._open_trace(config, max_model_len, pool.num_usable),
        )
        return EngineCore(
            waiter=self._waiter,
            parent=self._parent,
            frontends=self._frontends,
            admission=admission,
            scheduler=scheduler,
            recovery=Recovery(
                executor=self._executor,
                scheduler=scheduler,
                supervisor=Supervisor(config.max_worker_restarts, time.monotonic()),
                recorder=observer.recorder,
            ),
            observer=observer,
            pipeline_depth=config.pipeline_depth,
        )

    def _open_trace(self, config: EngineConfig, max_model_len: int, num_blocks: int) -> FileSink | None:
        if config.trace_file is None:
            return None
        header = TraceHeader(
            version=TRACE_VERSION,
            folovllm_version=folovllm.__version__,
            model=config.model,
            started_at=time.time(),
            block_size=config.block_size,
            num_blocks=num_blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=max_model_len,
            scheduling_policy=config.scheduling_policy,
            enable_prefix_caching=config.enable_prefix_caching,
            long_prefill_token_threshold=config.long_prefill_token_threshold,
            max_num_partial_prefills=config.max_num_partial_prefills,
            target_itl_s=None if config.target_itl_ms is None else config.target_itl_ms / 1000,
            pipeline_depth=config.pipeline_depth,
        )
        self._sink = FileSink(TraceWriter(config.trace_file, header))
        logger.info("recording the scheduler's decisions, and all token ids, in %s", config.trace_file)
        return self._sink

    def _remove_at_end(self, runtime_dir: pathlib.Path) -> None:
        self._runtime_dirs.add(runtime_dir)
        if self._watch is not None:
            self._watch.set_last_will(self._remove_files)

    def _remove_socket_file(self) -> None:
        """Once, and before the socket closes: then another engine may take the name."""
        endpoint, self._endpoint = self._endpoint, ""
        if endpoint:
            remove_socket_file(endpoint)

    def _remove_files(self) -> None:
        self._remove_socket_file()
        for folder in self._runtime_dirs:
            shutil.rmtree(folder, ignore_errors=True)

    def _tell(self, failure: Failed) -> None:
        """Tells the frontends and the parent why the engine ends."""
        message = f"{failure.process}: {failure.error_type}: {failure.message}"
        logger.error("the engine ends: %s", message)
        if self._frontends is not None:
            self._frontends.fail(message)
        self._parent.send(failure)

    def _close(self) -> None:
        self._remove_socket_file()
        if self._executor is not None:
            self._executor.close(_WORKER_GRACE_S)
        if self._sink is not None:
            self._sink.close()
        if self._grammars is not None:
            self._grammars.close()
        if self._authenticator is not None:
            self._authenticator.close()
        self._context.destroy(_LINGER_MS)
        self._remove_files()


def _resolve_limits(config: EngineConfig) -> tuple[int, int]:
    """max_model_len and num_valid_token_ids, from options and model. Raises ConfigError or ModelError."""
    model = read_model_config(pathlib.Path(config.model))
    max_model_len = model.default_max_model_len if config.max_model_len is None else config.max_model_len
    if max_model_len > model.longest_max_model_len:
        raise ConfigError(
            f"max_model_len={max_model_len} is more than the model's maximum, {model.longest_max_model_len}"
        )
    known = model.vocab_size if config.num_valid_token_ids is None else config.num_valid_token_ids
    return max_model_len, min(known, model.vocab_size)


def _scheduler(config: EngineConfig, manager: KVCacheManager, max_model_len: int) -> Scheduler:
    return Scheduler(
        kv_cache_manager=manager,
        queue=RequestQueue(config.scheduling_policy),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        bounds=ChunkBounds(
            config.long_prefill_token_threshold,
            config.max_num_partial_prefills,
            None if config.target_itl_ms is None else config.target_itl_ms / 1000,
        ),
    )


def _welcome(
    config: EngineConfig,
    ready: WorkerReady,
    manager: KVCacheManager,
    max_model_len: int,
    num_valid_token_ids: int,
) -> Welcome:
    return Welcome(
        model=config.model,
        max_model_len=max_model_len,
        num_valid_token_ids=num_valid_token_ids,
        block_size=config.block_size,
        num_blocks=manager.pool.num_usable,
        max_num_seqs=config.max_num_seqs,
        device=ready.device,
        dtype=ready.dtype,
        version=folovllm.__version__,
    )


def _log_pool(num_pool_tokens: int, block_size: int, max_model_len: int) -> None:
    blocks = num_pool_tokens // block_size
    logger.info("KV pool: %d blocks of %d tokens (%d tokens)", blocks, block_size, num_pool_tokens)
    if num_pool_tokens < max_model_len:
        logger.warning(
            "the KV pool holds %d tokens, less than max_model_len=%d: longer prompts are refused, answers end there",
            num_pool_tokens,
            max_model_len,
        )
