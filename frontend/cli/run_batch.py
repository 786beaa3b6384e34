"""`folovllm run-batch`: answers a file of requests, without a server."""

from typing import TYPE_CHECKING, Any

import click

from folovllm.frontend.cli.options import GroupedCommand, complete_model, engine_options, option, taken_engine_options
from folovllm.frontend.cli.serve import need_server_libraries, short_name

if TYPE_CHECKING:
    from folovllm.frontend.async_llm import AsyncLLM
    from folovllm.frontend.server.batch import BatchCounts
    from folovllm.frontend.server.batch_files import BatchFiles
    from folovllm.frontend.server.options import ServerOptions

_EXAMPLES = (
    "folovllm run-batch -i requests.jsonl -o answers.jsonl --model demo",
    "cat requests.jsonl | folovllm run-batch -i - -o - --model demo > answers.jsonl",
    "folovllm run-batch -i requests.jsonl -o answers.jsonl --engine ipc:///tmp/engine.sock --resume",
)
_BATCH = "Batch"
_FILE = click.Path(allow_dash=True)
_MAX_IN_WORK = 512  # twice what an engine runs at once unless told otherwise, so that it never waits for us


@click.command("run-batch", cls=GroupedCommand, examples=_EXAMPLES, short_help="Answers a file of requests.")
@option(
    _BATCH,
    "-i",
    "--input-file",
    required=True,
    type=_FILE,
    metavar="FILE",
    help="Requests, one JSON object a line; - is stdin.",
)
@option(
    _BATCH, "-o", "--output-file", required=True, type=_FILE, metavar="FILE", help="Takes the answers; - is stdout."
)
@option(_BATCH, "--model", default=None, shell_complete=complete_model, help="Folder, hub id or 'demo'.")
@option(_BATCH, "--engine", default=None, metavar="ENDPOINT", help="Use a running engine; --model is not needed.")
@option(
    _BATCH,
    "--served-model-name",
    "served_model_names",
    multiple=True,
    help="Name that bodies ask for; may be given several times [MODEL].",
)
@option(_BATCH, "--max-in-work", type=click.IntRange(1, 100_000), default=_MAX_IN_WORK, help="Lines at once [512].")
@option(_BATCH, "--resume", is_flag=True, help="Keep what the output holds, and pass those custom ids over.")
@option(_BATCH, "--max-body-mb", type=float, default=8.0, help="Longest line in MiB [8].")
@option(_BATCH, "--tool-parser", default="auto", help="Parser of tool calls, 'auto' or 'none' [auto].")
@option(_BATCH, "--reasoning-parser", default="auto", help="Parser of reasoning, 'auto' or 'none' [auto].")
@option(_BATCH, "--disable-tqdm", is_flag=True, help="Show no progress bar.")
@engine_options
def run_batch(model: str | None, engine: str | None, **given: Any) -> None:
    """Answers the requests of a file in OpenAI's batch form, and writes an output line for each.

    A line is {"custom_id": …, "method": "POST", "url": "/v1/chat/completions" or "/v1/completions", "body": {…}}, its
    body that of the HTTP API. Output lines come as answers are ready, and name the custom_id. A request that is refused
    has its error in the response; a line that is no request has one in its place. Neither stops the run.

    Exit codes: 0 all lines have their output line, 1 the engine failed, 2 wrong input.
    """
    if (model is None) == (engine is None):
        raise click.UsageError("give either --model MODEL (a folder, a hub id or 'demo') or --engine ENDPOINT")
    if given["resume"] and given["output_file"] == "-":
        raise click.UsageError("--resume reads what the output file holds; standard output has no such thing")
    need_server_libraries()
    from folovllm.frontend.async_llm import AsyncLLM
    from folovllm.frontend.server.batch_files import open_files
    from folovllm.frontend.server.options import ServerOptions

    names = given["served_model_names"] or (() if model is None else (short_name(model),))
    options = ServerOptions(
        served_model_names=names, **{name: given[name] for name in ("max_body_mb", "tool_parser", "reasoning_parser")}
    )
    with open_files(given["input_file"], given["output_file"], resume=given["resume"]) as files:
        llm = AsyncLLM(model, tokenizer=given["tokenizer"], engine=engine, **taken_engine_options(given))
        try:
            if not given["resume"]:
                files.start_anew()
            counts = _answer_all(llm, options, files, given)
        finally:
            llm.close()
    skipped = f", {counts.skipped} passed over" if given["resume"] else ""
    told = f"{counts.answered} answered, {counts.failed} refused or failed, {counts.invalid} lines without a request"
    click.echo(told + skipped, err=True)


def _answer_all(llm: "AsyncLLM", options: "ServerOptions", files: "BatchFiles", given: dict[str, Any]) -> "BatchCounts":
    from folovllm.frontend.event_loop import run_to_end
    from folovllm.frontend.progress import Bar
    from folovllm.frontend.server.batch import Batch
    from folovllm.frontend.server.batch_lines import LineReader
    from folovllm.frontend.server.context import ServerContext

    batch = Batch(
        ServerContext(llm, options),
        LineReader(files.source, int(options.max_body_mb * 2**20)),
        files.sink,
        files.done,
    )
    with Bar(files.num_lines, shown=not given["disable_tqdm"], unit="request") as bar:
        run_to_end(batch.run(given["max_in_work"], bar.advance))
    return batch.counts
