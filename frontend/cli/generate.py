"""`folovllm generate`: answers prompts and prints the answers."""

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from folovllm.frontend.cli.options import (
    GroupedCommand,
    complete_model,
    engine_options,
    option,
    sampling_options,
    taken_engine_options,
    taken_sampling_params,
)

if TYPE_CHECKING:
    from folovllm.frontend.outputs import CompletionOutput, Logprob, RequestOutput

_EXAMPLES = (
    'folovllm generate "The capital of France is" --model demo --temperature 0',
    'folovllm generate "Once upon" "Long ago" --model demo --max-tokens 40 -n 2',
    "cat prompts.txt | folovllm generate - --model demo --json",
    'folovllm generate "Two plus two is" --model demo --choice " three" --choice " four" --json --logprobs 3',
)
_LOGPROBS_HELP = "With --json: each token's log probability, and those of the so many most likely ones."


@click.command(cls=GroupedCommand, examples=_EXAMPLES, short_help="Answers prompts.")
@click.argument("prompts", nargs=-1, required=True)
@option(
    "Prompts and output",
    "--model",
    default=None,
    shell_complete=complete_model,
    help="Folder, hub id or 'demo' [demo, unless --engine is given].",
)
@option("Prompts and output", "--engine", default=None, metavar="ENDPOINT", help="Use a running engine instead.")
@option("Prompts and output", "-n", type=int, default=1, help="Answers to each prompt [1].")
@option("Prompts and output", "--json", "as_json", is_flag=True, help="One JSON object per prompt.")
@option("Prompts and output", "--logprobs", type=int, default=None, help=_LOGPROBS_HELP)
@option("Prompts and output", "--prompt-logprobs", type=int, default=None, help="The same for the prompt's tokens.")
@option("Prompts and output", "--verbose", is_flag=True, help="Show the start-up table and a progress bar.")
@sampling_options
@engine_options
def generate(prompts: tuple[str, ...], model: str | None, engine: str | None, **given: Any) -> None:
    """Answers PROMPTS, all together, and prints the answers.

    A single '-' reads the prompts from standard input, one a line.
    """
    from folovllm.frontend.llm import LLM

    reported = {name: given[name] for name in ("logprobs", "prompt_logprobs")}
    if any(value is not None for value in reported.values()) and not given["as_json"]:
        raise click.UsageError("log probabilities are part of the JSON output: give --json too")
    params = taken_sampling_params(given, n=given["n"], **reported)
    texts = [line.rstrip("\n") for line in sys.stdin] if prompts == ("-",) else list(prompts)
    chosen = model or (None if engine else "demo")
    with LLM(chosen, tokenizer=given["tokenizer"], engine=engine, **taken_engine_options(given)) as llm:
        if given["verbose"]:
            click.echo(llm.startup.table() + "\n", err=True)
        for output in llm.generate(texts, params, use_tqdm=given["verbose"]):
            click.echo(_as_json(output) if given["as_json"] else _as_text(output))


def _as_text(output: "RequestOutput") -> str:
    """Prompt and answer as one text; a blank line sets several answers apart."""
    return "\n\n".join(f"{output.prompt}{answer.text}" for answer in output.outputs)


def _as_json(output: "RequestOutput") -> str:
    shown: dict[str, Any] = {"prompt": output.prompt, "outputs": [_answer(answer) for answer in output.outputs]}
    if output.prompt_logprobs is not None:
        shown["prompt_logprobs"] = [place and _place(place) for place in output.prompt_logprobs]
    return json.dumps(shown, ensure_ascii=False)


def _answer(answer: "CompletionOutput") -> dict[str, Any]:
    shown: dict[str, Any] = {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    if answer.logprobs is not None:
        shown["cumulative_logprob"] = answer.cumulative_logprob
        shown["logprobs"] = [_place(place) for place in answer.logprobs]
    return shown


def _place(place: "dict[int, Logprob]") -> list[dict[str, Any]]:
    """The token itself, then its alternatives."""
    return [
        {"token_id": token_id, "token": entry.decoded_token, "logprob": entry.logprob, "rank": entry.rank}
        for token_id, entry in place.items()
    ]
