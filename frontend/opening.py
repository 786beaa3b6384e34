"""Everything between `LLM(...)` and the first request: starts an engine, or dials one, and makes what serves it.

Used by LLM, AsyncLLM and `folovllm engine` alike, so that there is one way to start.
"""

import dataclasses
import os
import pathlib
import random

import msgspec

from folovllm.common.config import EngineConfig
from folovllm.common.errors import ConfigError, ModelError
from folovllm.common.log import get_logger, setup_logging
from folovllm.common.messages.lifecycle import CoreReady
from folovllm.common.model_config import read_model_config
from folovllm.frontend.chat_template import ChatTemplate
from folovllm.frontend.core_client import CoreClient
from folovllm.frontend.engine_options import EngineOptions, make_config
from folovllm.frontend.engine_process import EngineProcess
from folovllm.frontend.generation_defaults import ModelDefaults, read_model_defaults
from folovllm.frontend.input_processor import InputProcessor
from folovllm.frontend.model_hub import resolve
from folovllm.frontend.output_processor import OutputProcessor
from folovllm.frontend.startup_table import StartupReport, Stopwatch
from folovllm.frontend.tokenizer import Tokenizer

logger = get_logger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class StartedEngine:
    """An engine that this process started: its process, what it reported, and how long it took."""

    process: EngineProcess
    ready: CoreReady
    tokenizer: Tokenizer | None
    watch: Stopwatch


@dataclasses.dataclass(frozen=True, slots=True)
class OpenEngine:
    """An engine that is ready for requests, and what a frontend needs to put them.

    Attributes:
        process: None where somebody else started the engine.
        client: the connection.
        tokenizer: None where the model has none.
        chat: None where the model has no tokenizer.
        defaults: of the model.
        inputs, outputs: what turns prompts into requests, and reports into outputs.
        startup: how the start went.
    """

    process: EngineProcess | None
    client: CoreClient
    tokenizer: Tokenizer | None
    chat: ChatTemplate | None
    defaults: ModelDefaults
    inputs: InputProcessor
    outputs: OutputProcessor
    startup: StartupReport

    def close(self) -> None:
        """Hangs up, and ends the engine if it is this process's own."""
        self.client.close()
        if self.process is not None:
            self.process.stop()


def open_engine(
    model: str | os.PathLike[str] | None,
    tokenizer: str | os.PathLike[str] | None,
    engine: str | None,
    options: EngineOptions,
) -> OpenEngine:
    """Starts an engine for `model`, or dials the one at endpoint `engine`.

    Raises:
        ConfigError: an option is wrong, or does not go with `engine`.
        ModelError: the model's folder cannot be used.
        EngineStartError: the engine's processes could not start; the message is their own.
        EngineDeadError: no engine answers at `engine`.
    """
    if options.get("log_level") is not None:
        setup_logging("frontend", options["log_level"] or "")
    if engine is not None:
        return _dial(engine, model, tokenizer, options)
    if model is None:
        raise ConfigError("give a model (a folder, 'demo', or a hub id), or engine=ENDPOINT of a running engine")
    watch = Stopwatch()
    with watch.phase("find model"):
        folder = resolve(model)
    started = start_engine(folder, tokenizer, options, watch=watch)
    try:
        with watch.phase("connect"):
            client = CoreClient(started.ready.endpoint, engine=started.process)
        seeds = random.Random(options.get("seed", 0))
        return _assemble(started.process, client, started.tokenizer, folder, seeds, (watch, started.ready))
    except BaseException:
        started.process.stop()
        raise


def start_engine(
    folder: pathlib.Path,
    tokenizer: str | os.PathLike[str] | None,
    options: EngineOptions,
    *,
    watch: Stopwatch,
    listen: str = "",
) -> StartedEngine:
    """Starts core and worker, loads the tokenizer meanwhile. A start that fails or is interrupted leaves nothing."""
    with watch.phase("check options"):
        config = make_config(folder, options)
        num_columns = read_model_config(folder).vocab_size
    with watch.phase("start core process"):
        process = EngineProcess()
    try:
        with watch.phase("load tokenizer"):
            loaded = load_tokenizer(folder, tokenizer)
        config = _with_id_bound(config, loaded, num_columns)
        ready = process.wait_ready(config, listen=listen, started_at=watch.began)
    except BaseException:
        process.stop()
        raise
    return StartedEngine(process, ready, loaded, watch)


def _with_id_bound(config: EngineConfig, tokenizer: Tokenizer | None, num_columns: int) -> EngineConfig:
    """The one bound on token ids: what the tokenizer knows, where the logits have columns for it."""
    if tokenizer is None:
        return config
    return msgspec.structs.replace(config, num_valid_token_ids=min(tokenizer.num_ids, num_columns))


def load_tokenizer(folder: pathlib.Path, tokenizer: str | os.PathLike[str] | None) -> Tokenizer | None:
    """The tokenizer of `tokenizer` (like a model: folder, name or hub id), else of the model's own `folder`.

    A model folder without any tokenizer file is warned of and gives None: its prompts are token ids, its texts empty.
    """
    if tokenizer is not None:
        return Tokenizer.from_folder(_tokenizer_folder(tokenizer))
    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).exists() for name in files):
        logger.warning("%s has no tokenizer: prompts must be token ids, and answers have no text", folder)
        return None
    return Tokenizer.from_folder(folder)


def _tokenizer_folder(tokenizer: str | os.PathLike[str]) -> pathlib.Path:
    folder = pathlib.Path(tokenizer).expanduser()
    return folder if (folder / "tokenizer.json").is_file() else resolve(tokenizer)


def _dial(
    engine: str,
    model: str | os.PathLike[str] | None,
    tokenizer: str | os.PathLike[str] | None,
    options: EngineOptions,
) -> OpenEngine:
    given = sorted(set(options) - {"log_level"})
    if given:
        raise ConfigError(
            f"{', '.join(given)} cannot be given with engine={engine}, which was started with options of its own; "
            "give them to `folovllm engine`"
        )
    watch = Stopwatch()
    with watch.phase("connect"):
        client = CoreClient(engine)
    try:
        folder = _model_of(client, model)
        with watch.phase("load tokenizer"):
            loaded = load_tokenizer(folder, tokenizer)
        return _assemble(None, client, loaded, folder, random.SystemRandom(), (watch, None))
    except BaseException:
        client.close()
        raise


def _model_of(client: CoreClient, model: str | os.PathLike[str] | None) -> pathlib.Path:
    """The folder of the model that the engine serves; `model`, if given, must be that, or a copy where it is absent."""
    served = pathlib.Path(client.welcome.model)
    if model is None:
        if served.is_dir():
            return served
        raise ModelError(
            f"the engine's model folder {served} is not on this machine: give a copy of it as model=FOLDER"
        )
    folder = resolve(model)
    if served.is_dir() and not folder.samefile(served):
        raise ConfigError(f"model {os.fspath(model)!r} is not what this engine serves, which is {served}")
    return folder


def _assemble(
    process: EngineProcess | None,
    client: CoreClient,
    tokenizer: Tokenizer | None,
    folder: pathlib.Path,
    seeds: random.Random,
    start: tuple[Stopwatch, CoreReady | None],
) -> OpenEngine:
    watch, ready = start
    with watch.phase("chat template and defaults"):
        defaults = read_model_defaults(folder, tokenizer)
        chat = None if tokenizer is None else ChatTemplate.from_tokenizer(tokenizer)
        inputs = InputProcessor(
            tokenizer,
            defaults,
            max_model_len=client.welcome.max_model_len,
            num_valid_token_ids=client.welcome.num_valid_token_ids,
            seeds=seeds,
        )
    return OpenEngine(
        process=process,
        client=client,
        tokenizer=tokenizer,
        chat=chat,
        defaults=defaults,
        inputs=inputs,
        outputs=OutputProcessor(tokenizer),
        startup=watch.report(ready.phases if ready else [], ready.memory if ready else []),
    )
