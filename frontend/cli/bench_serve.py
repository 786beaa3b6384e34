"""`folovllm bench serve`: load on any OpenAI-compatible server."""

import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from folovllm.frontend.cli.bench_shared import (
    DATASETS,
    check_dataset,
    make_works,
    need_libraries,
    save_json,
    taken_percentiles,
)
from folovllm.frontend.cli.options import Command, GroupedCommand, option

if TYPE_CHECKING:
    from folovllm.frontend.benchmark.http_request import Target
    from folovllm.frontend.benchmark.serving import Plan
    from folovllm.frontend.benchmark.workload import CountTokens

_EXAMPLES = (
    "folovllm bench serve --num-prompts 100 --max-concurrency 16 --random-input-len 64 --random-output-len 64",
    "folovllm bench serve --base-url http://host:8000 --backend chat --request-rate 4 --goodput ttft:200 tpot:50",
    "folovllm bench serve --dataset-name sharegpt --dataset-path sharegpt.json --tokenizer demo --save-result",
)
_SERVER, _WORK, _LOAD, _BODY, _RESULT = "Server", "Requests", "Load", "Fields of each request", "Result"

_WORK_OPTIONS: tuple[tuple[str, Any, Any, str], ...] = (
    ("num_prompts", click.IntRange(min=1), 1000, "Requests to send [1000]."),
    ("dataset_path", click.Path(path_type=pathlib.Path), None, "File with conversations in ShareGPT's form."),
    ("sharegpt_output_len", click.IntRange(min=4), None, "Tokens of each answer [as many as in the file]."),
    ("tokenizer", str, None, "Counts the file's tokens: folder, hub id or 'demo' [4 characters a token]."),
    ("random_input_len", int, None, "random: tokens of each prompt [1024]."),
    ("random_output_len", int, None, "random: tokens of each answer [128]."),
    ("random_range_ratio", float, None, "random: lengths lie within this share around those two [0]."),
    ("random_prefix_len", int, None, "random: tokens that all prompts begin with, besides [0]."),
    ("seed", click.IntRange(min=0), 0, "Seed of prompts, lengths and arrivals [0]."),
)
_DATASET_OPTIONS = {
    "random": {name: f"random_{name}" for name in ("input_len", "output_len", "range_ratio", "prefix_len")},
    "sharegpt": {"path": "dataset_path", "output_len": "sharegpt_output_len", "tokenizer": "tokenizer"},
    "sharegpt-like": {},
}
_LOAD_OPTIONS: tuple[tuple[str, Any, Any, str], ...] = (
    ("request_rate", float, math.inf, "Requests a second on average; 'inf' sends all at once [inf]."),
    ("burstiness", float, 1.0, "Arrivals: 1 is a Poisson process, less comes in bursts, more evenly [1]."),
    ("max_concurrency", click.IntRange(min=1), None, "Most requests at once; further ones wait [no bound]."),
    ("num_warmups", click.IntRange(min=0), 1, "Requests before the clock starts [1]."),
)
_BODY_OPTIONS: tuple[tuple[str, Any, Any, str], ...] = (
    ("temperature", float, 0.0, "0 is greedy [0]."),
    ("top_p", float, None, "As in the API [the server's]."),
    ("top_k", int, None, "As in the API [the server's]."),
    ("min_p", float, None, "As in the API [the server's]."),
)


def _options(group: str, specs: Sequence[tuple[str, Any, Any, str]]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for name, kind, default, text in reversed(specs):
            command = option(group, "--" + name.replace("_", "-"), name, type=kind, default=default, help=text)(command)
        return command

    return add


class _ManyGoodputs(GroupedCommand):
    """`--goodput ttft:200 tpot:50`, as vLLM's command has it: click's options take one value at a time."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        follows = False
        for arg in args:
            if follows and spread[-1] != "--goodput" and not arg.startswith("-"):
                spread.append("--goodput")
            follows = arg == "--goodput" or (follows and not arg.startswith("-"))
            spread.append(arg)
        return super().parse_args(ctx, spread)


@click.command(cls=_ManyGoodputs, examples=_EXAMPLES, short_help="Puts load on an OpenAI-compatible server.")
@option(_SERVER, "--base-url", default=None, metavar="URL", help="Where the server is [http://HOST:PORT].")
@option(_SERVER, "--host", default="127.0.0.1", help="Its host [127.0.0.1].")
@option(_SERVER, "--port", type=int, default=8000, help="Its port [8000].")
@option(_SERVER, "--endpoint", default=None, metavar="PATH", help="Path of the API [the backend's].")
@option(
    _SERVER,
    "--backend",
    type=click.Choice(["completions", "chat"]),
    default="completions",
    help="Which API [completions].",
)
@option(_SERVER, "--model", default=None, help="Name of the model there [its first one].")
@option(_SERVER, "--api-key", default=None, metavar="KEY", help="Key of the server [none].")
@option(
    _WORK,
    "--dataset-name",
    type=click.Choice(DATASETS),
    default="random",
    help="Where lengths and prompts are from [random].",
)
@_options(_WORK, _WORK_OPTIONS)
@_options(_LOAD, _LOAD_OPTIONS)
@_options(_BODY, _BODY_OPTIONS)
@option(_BODY, "--ignore-eos", is_flag=True, help="Answers do not end before their length.")
@option(_BODY, "--extra-body", default=None, metavar="JSON", help="Object with further fields of the body.")
@option(_RESULT, "--goodput", multiple=True, metavar="METRIC:MS...", help="Bounds of ttft, tpot, e2el that count.")
@option(_RESULT, "--metric-percentiles", default="50,90,99", metavar="P,P", help="Percentiles to report [50,90,99].")
@option(_RESULT, "--save-result", is_flag=True, help="Write the result as JSON, and a picture beside it.")
@option(_RESULT, "--save-detailed", is_flag=True, help="With --save-result: every request's own values too.")
@option(_RESULT, "--result-dir", type=click.Path(path_type=pathlib.Path), default=".", help="Folder of both [this].")
@option(_RESULT, "--result-filename", default=None, help="Name of the JSON file [from date, model and rate].")
@option(_RESULT, "--metadata", multiple=True, metavar="KEY=VALUE", help="Written to the JSON; several times.")
@option(_RESULT, "--disable-tqdm", is_flag=True, help="Show no progress bar.")
def serve(**given: Any) -> int:
    """Sends requests to a server at a rate, or as many at once as told, and reports latencies and throughput.

    Any server with OpenAI's streaming chat or text completions will do. Prompts are common English words (random), the
    questions of a file of conversations (sharegpt), or words with lengths distributed as there (sharegpt-like). Token
    counts are the server's own. Options that vLLM's command has too are named as there.

    Exit codes: 0 done, 1 no request was answered, 2 wrong input, or the first request failed.
    """
    need_libraries(("aiohttp", "uvloop", *(["matplotlib"] if given["save_result"] else [])))
    from folovllm.frontend.benchmark.serving import errors_told, run_plan, summary
    from folovllm.frontend.progress import Bar

    if given["save_detailed"] and not given["save_result"]:
        raise click.UsageError("--save-detailed is about the file of --save-result: give it too")
    check_dataset(given, _DATASET_OPTIONS)
    metadata = _metadata(given["metadata"])
    plan = _plan(given)
    with Bar(len(plan.works), shown=not given["disable_tqdm"], unit="request") as bar:
        outcome, result = run_plan(plan, lambda _: bar.advance())
    click.echo(summary(result, plan.percentiles))
    if told := errors_told(outcome.records):
        click.echo(f"\nfailed:\n{told}", err=True)
    if given["save_result"]:
        _save(given, metadata, outcome, result)
    return 0 if result["completed"] else 1


def _plan(given: dict[str, Any]) -> "Plan":
    from folovllm.frontend.benchmark.figures import parse_goodput
    from folovllm.frontend.benchmark.serving import Plan

    goodput = parse_goodput(given["goodput"])
    count_tokens = None if given["tokenizer"] is None else _counter(given["tokenizer"])
    works = make_works(given, _DATASET_OPTIONS, seed=given["seed"], count_tokens=count_tokens)
    return Plan(
        target=_target(given),
        works=works,
        request_rate=given["request_rate"],
        burstiness=given["burstiness"],
        max_concurrency=given["max_concurrency"],
        num_warmups=given["num_warmups"],
        seed=given["seed"],
        percentiles=taken_percentiles(given["metric_percentiles"]),
        goodput_ms=goodput,
    )


def _target(given: dict[str, Any]) -> "Target":
    from folovllm.frontend.benchmark.http_request import PATHS, Target
    from folovllm.frontend.openai_client import OpenAIClient

    base = (given["base_url"] or f"http://{given['host']}:{given['port']}").rstrip("/")
    client = OpenAIClient(base, given["api_key"])  # made even where --model is given: it refuses what is no URL
    model = given["model"] or client.models()[0]
    path = given["endpoint"] or PATHS[given["backend"]]
    root = base.removesuffix("/v1") if path.startswith("/v1/") else base
    fields = {name: given[name] for name, *_ in _BODY_OPTIONS if given[name] is not None}
    fields |= {"ignore_eos": True} if given["ignore_eos"] else {}
    return Target(f"{root}/{path.lstrip('/')}", given["backend"], model, given["api_key"], fields | _extra(given))


def _extra(given: dict[str, Any]) -> dict[str, Any]:
    try:
        extra = json.loads(given["extra_body"] or "{}")
    except json.JSONDecodeError as error:
        raise click.UsageError(f"--extra-body is no JSON: {error}") from error
    if not isinstance(extra, dict):
        raise click.UsageError(f"--extra-body must be an object, such as '{{\"top_k\": 5}}', not {extra!r}")
    return extra


def _counter(name: str) -> "CountTokens":
    from folovllm.frontend.model_hub import resolve
    from folovllm.frontend.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(resolve(name))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def _metadata(given: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    if wrong := [text for text, (_, sign, _) in zip(given, pairs, strict=True) if not sign]:
        raise click.UsageError(f"--metadata {wrong[0]!r} is no KEY=VALUE")
    return {key: value for key, _, value in pairs}


def _save(given: dict[str, Any], metadata: dict[str, str], outcome: Any, result: dict[str, Any]) -> None:
    from folovllm.frontend.benchmark.picture import save_serving_picture
    from folovllm.frontend.benchmark.serving import details

    date = time.strftime("%Y%m%d-%H%M%S")
    rate, model = result["request_rate"], pathlib.PurePath(result["model_id"]).name
    path = given["result_dir"] / (given["result_filename"] or f"{result['backend']}-{rate}qps-{model}-{date}.json")
    more = details(outcome) if given["save_detailed"] else {}
    save_json(path, {"date": date, **metadata, **result, **more})
    if result["completed"]:
        picture = path.with_suffix(".png")
        bound = f", at most {result['max_concurrency']} at once" if result["max_concurrency"] else ""
        save_serving_picture(outcome, f"{model}: {result['num_prompts']} requests, {rate} a second{bound}", picture)
        click.echo(f"wrote {picture}")
