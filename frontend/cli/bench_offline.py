"""`folovllm bench latency` and `folovllm bench throughput`: an engine without a server."""

import pathlib
from typing import TYPE_CHECKING, Any

import click

from folovllm.frontend.cli.bench_shared import DATASETS, check_dataset, make_works, save_json, taken_percentiles
from folovllm.frontend.cli.options import GroupedCommand, complete_model, engine_options, option, taken_engine_options

if TYPE_CHECKING:
    from folovllm.frontend.llm import LLM

_LATENCY_EXAMPLES = (
    "folovllm bench latency --model demo --input-len 32 --output-len 128 --batch-size 8",
    "folovllm bench latency --engine ipc:///tmp/engine.sock --num-iters 5 --output-json latency.json",
)
_THROUGHPUT_EXAMPLES = (
    "folovllm bench throughput --model demo --num-prompts 64 --input-len 128 --output-len 128",
    "folovllm bench throughput --model demo --num-prompts 32 --dataset-name sharegpt-like --output-json run.json",
)
_WORK, _RESULT = "Work", "Result"
_DATASET_OPTIONS = {
    "random": {
        "input_len": "input_len",
        "output_len": "output_len",
        "range_ratio": "random_range_ratio",
        "prefix_len": "prefix_len",
    },
    "sharegpt": {"path": "dataset_path", "output_len": "output_len"},
    "sharegpt-like": {},
}
_POSITIVE = click.IntRange(min=1)


_model = option(
    _WORK,
    "--model",
    default=None,
    shell_complete=complete_model,
    help="Folder, hub id or 'demo' [demo, unless --engine is given].",
)
_engine = option(_WORK, "--engine", default=None, metavar="ENDPOINT", help="Use a running engine instead.")
_output_json = option(
    _RESULT, "--output-json", type=click.Path(path_type=pathlib.Path), default=None, help="Write the result there."
)
_no_bar = option(_RESULT, "--disable-tqdm", is_flag=True, help="Show no progress bar.")
_seed = option(
    _WORK, "--prompt-seed", type=click.IntRange(min=0), default=0, help="Seed of prompts, and of lengths [0]."
)


def _open(model: str | None, engine: str | None, given: dict[str, Any]) -> "LLM":
    from folovllm.frontend.llm import LLM

    chosen = model or (None if engine else "demo")
    return LLM(chosen, tokenizer=given["tokenizer"], engine=engine, **taken_engine_options(given))


@click.command(cls=GroupedCommand, examples=_LATENCY_EXAMPLES, short_help="Times one batch, again and again.")
@_model
@_engine
@option(_WORK, "--input-len", type=_POSITIVE, default=32, help="Tokens of each prompt [32].")
@option(_WORK, "--output-len", type=_POSITIVE, default=128, help="Tokens of each answer [128].")
@option(_WORK, "--batch-size", type=_POSITIVE, default=8, help="Requests in the batch [8].")
@option(_WORK, "--n", type=_POSITIVE, default=1, help="Answers to each prompt [1].")
@option(_WORK, "--num-iters-warmup", type=click.IntRange(min=0), default=10, help="Batches before the clock [10].")
@option(_WORK, "--num-iters", type=_POSITIVE, default=30, help="Batches that count [30].")
@_seed
@option(_RESULT, "--percentiles", default="10,25,50,75,90,99", help="To report [10,25,50,75,90,99].")
@_output_json
@_no_bar
@engine_options
def latency(model: str | None, engine: str | None, **given: Any) -> None:
    """Answers one batch of random prompts again and again, and reports how long it takes from call to return.

    Every batch has other prompts, so none is found in the prefix cache. Options that vLLM's command has too are named
    as there.
    """
    from folovllm.frontend.benchmark.offline import latency_figures, measure_latency
    from folovllm.frontend.progress import Bar

    percentiles = taken_percentiles(given["percentiles"])
    sizes = (given["batch_size"], given["input_len"], given["output_len"])
    num_iters, num_warmups = given["num_iters"], given["num_iters_warmup"]
    with (
        _open(model, engine, given) as llm,
        Bar(num_warmups + num_iters, shown=not given["disable_tqdm"], unit="batch") as bar,
    ):
        seconds = measure_latency(
            llm,
            sizes,
            n=given["n"],
            num_warmups=num_warmups,
            num_iters=num_iters,
            seed=given["prompt_seed"],
            on_end=bar.advance,
        )
    figures = latency_figures(seconds, percentiles)
    click.echo(f"mean {figures['avg_latency']:.4f} s")
    for name, value in figures["percentiles"].items():
        click.echo(f"p{name} {value:.4f} s")
    if given["output_json"] is not None:
        asked = dict(zip(("batch_size", "input_len", "output_len"), sizes, strict=True))
        save_json(given["output_json"], {**asked, "n": given["n"], **figures})


@click.command(cls=GroupedCommand, examples=_THROUGHPUT_EXAMPLES, short_help="Times many requests at once.")
@_model
@_engine
@option(_WORK, "--num-prompts", type=_POSITIVE, default=1000, help="Requests, put at once [1000].")
@option(
    _WORK,
    "--dataset-name",
    type=click.Choice(DATASETS),
    default="random",
    help="Where lengths and prompts are from, as for 'bench serve' [random].",
)
@option(_WORK, "--dataset-path", type=click.Path(path_type=pathlib.Path), help="File in ShareGPT's form.")
@option(_WORK, "--input-len", type=_POSITIVE, default=None, help="random: tokens of each prompt [1024].")
@option(_WORK, "--output-len", type=_POSITIVE, default=None, help="Tokens of each answer [random: 128].")
@option(_WORK, "--random-range-ratio", type=float, default=None, help="random: lengths lie so far around [0].")
@option(_WORK, "--prefix-len", type=click.IntRange(min=0), default=None, help="random: tokens all begin with [0].")
@option(_WORK, "--n", type=_POSITIVE, default=1, help="Answers to each prompt [1].")
@_seed
@_output_json
@_no_bar
@engine_options
def throughput(model: str | None, engine: str | None, **given: Any) -> None:
    """Answers many prompts in one call, and reports requests and tokens a second.

    Prompts are made as for 'bench serve'; no answer ends before its length. Options that vLLM's command has too are
    named as there.
    """
    from folovllm.frontend.benchmark.offline import measure_throughput

    check_dataset(given, _DATASET_OPTIONS)
    with _open(model, engine, given) as llm:
        works = make_works(
            given,
            _DATASET_OPTIONS,
            seed=given["prompt_seed"],
            count_tokens=lambda text: len(llm.get_tokenizer().encode(text, add_special_tokens=False)),
        )
        figures = measure_throughput(llm, works, n=given["n"], show_progress=not given["disable_tqdm"])
    click.echo(
        f"{figures['requests_per_second']:.2f} requests/s, {figures['tokens_per_second']:.2f} tokens/s, "
        f"{figures['output_tokens_per_second']:.2f} output tokens/s"
    )
    if given["output_json"] is not None:
        save_json(given["output_json"], {"dataset_name": given["dataset_name"], "n": given["n"], **figures})
