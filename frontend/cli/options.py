"""Options that several commands share, in groups, and help pages that show them so.

The engine's options are made from one table; a test compares it with `EngineOptions`, so none can be forgotten.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from folovllm.common.sampling_params import SamplingParams
    from folovllm.common.structured_outputs import StructuredOutputsParams
    from folovllm.frontend.engine_options import EngineOptions

Command = TypeVar("Command", bound=Callable[..., Any])

_OTHER = "Other options"


class GroupedOption(click.Option):
    """An option that the help page shows under the heading `group`."""

    def __init__(self, *args: Any, group: str = _OTHER, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help page has its options in groups and its examples at the end."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                group = parameter.group if isinstance(parameter, GroupedOption) else _OTHER
                groups.setdefault(group, []).append(record)
        for group in sorted(groups, key=lambda name: name == _OTHER):
            with formatter.section(group):
                formatter.write_dl(groups[group])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{example}\n")


def complete_model(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What a shell offers for a model: folders, and the demo."""
    demo = [CompletionItem("demo")] if "demo".startswith(incomplete) else []
    return [CompletionItem(incomplete, type="dir"), *demo]


def option(group: str, *names: str, **attributes: Any) -> Callable[[Command], Command]:
    """`click.option` under a heading of the help page."""
    return click.option(*names, cls=GroupedOption, group=group, **attributes)


_ENGINE = "Engine"
_SAMPLING = "Sampling"
_Spec = tuple[str, Any, str]

ENGINE_OPTIONS: tuple[_Spec, ...] = (
    ("dtype", click.Choice(["auto", "bfloat16", "float16", "float32"]), "Type of weights and KV cache [auto]."),
    ("device", click.Choice(["auto", "cpu", "cuda"]), "Where the model runs [auto: CUDA where present]."),
    ("load_format", click.Choice(["auto", "dummy"]), "'dummy': random weights from config.json alone [auto]."),
    ("seed", int, "Seed for requests that bring none [0]."),
    ("max_model_len", int, "Longest prompt + answer in tokens [the model's]."),
    ("block_size", int, "Tokens in one KV block [16]."),
    ("num_gpu_blocks_override", int, "Number of KV blocks [from memory]."),
    ("gpu_memory_utilization", float, "Share of the device's memory that may be used [0.9]."),
    ("kv_cache_memory_gb", float, "Size of the KV pool in GiB [from memory]."),
    ("kv_cache_dtype", click.Choice(["auto", "fp8"]), "Type of the KV cache; 'fp8': half the bytes [the model's]."),
    ("max_num_seqs", int, "Requests running at once [256]."),
    ("max_num_batched_tokens", int, "Token budget of one step [2048]."),
    ("long_prefill_token_threshold", int, "Most tokens of one prompt in one step [none]."),
    ("max_num_partial_prefills", int, "Prompts partly computed at once [no bound]."),
    ("target_itl_ms", float, "Milliseconds between tokens that prompts must not exceed [no target]."),
    ("enable_prefix_caching", bool, "Take over what other requests have computed of a prompt's beginning [on]."),
    ("scheduling_policy", click.Choice(["fcfs", "priority"]), "Order of the queue [fcfs]."),
    ("pipeline_depth", click.IntRange(1, 2), "Steps in flight [2]."),
    ("max_num_queued_reqs", int, "Bound on waiting requests [100000]."),
    ("max_num_queued_tokens", int, "Bound on the prompt tokens of waiting requests [none]."),
    (
        "max_worker_restarts",
        int,
        "Workers that end in a row and are replaced; 0: the engine ends with its worker [10].",
    ),
    (
        "attention_backend",
        click.Choice(["auto", "torch_naive", "paged", "triton_paged", "flash_attn"]),
        "Attention implementation [auto].",
    ),
    ("batch_invariant", bool, "Answers whose numbers do not depend on the batch; on a CPU, 16-bit types [off]."),
    ("logits_processors", str, "A 'module:function' that requests may name; may be given several times."),
    ("cpu_threads", int, "Threads of a worker on the CPU [physical cores]."),
    ("trace_file", str, "Record the scheduler's decisions here, for 'folovllm trace' [no]."),
    ("log_interval_s", float, "Seconds between log lines about the engine's state; 0: none [10]."),
    (
        "log_level",
        click.Choice(["debug", "info", "warning", "error"]),
        "Log level [warning; 'engine': info].",
    ),
)

SAMPLING_OPTIONS: tuple[_Spec, ...] = (
    ("max_tokens", int, "Most tokens of an answer."),
    ("min_tokens", int, "No stop before this many tokens [0]."),
    ("temperature", float, "0 is greedy [the model's default]."),
    ("top_k", int, "Keep the k most likely tokens; -1 keeps all [the model's default]."),
    ("top_p", float, "Keep the most likely tokens up to this probability [the model's default]."),
    ("min_p", float, "Drop tokens less likely than this share of the most likely [the model's default]."),
    ("presence_penalty", float, "Taken off the logits of tokens that the answer holds already, -2 to 2 [0]."),
    ("frequency_penalty", float, "Taken off as often as the answer holds the token, -2 to 2 [0]."),
    ("repetition_penalty", float, "Makes tokens of prompt and answer less likely above 1 [the model's default]."),
    ("truncate_prompt_tokens", int, "Keep the last so many tokens of a prompt; -1: as many as fit [refuse it]."),
    ("timeout_s", float, "Seconds after which an answer ends as it is [no bound]."),
)


_ALLOWED_HELP = "Only such tokens may be chosen; may be given several times."
_BIAS_HELP = "Number added to a token's logit, -100 to 100; may be given several times."


def engine_options(command: Command) -> Command:
    """Adds the options of an engine of one's own."""
    for name, kind, text in reversed(ENGINE_OPTIONS):
        if kind is bool:
            command = option(_ENGINE, f"{_flag(name)}/{_flag('no_' + name)}", name, default=None, help=text)(command)
        elif name == "logits_processors":
            command = option(_ENGINE, "--logits-processor", name, multiple=True, help=text)(command)
        else:
            command = option(_ENGINE, _flag(name), name, type=kind, default=None, help=text)(command)
    tokenizer = option(_ENGINE, "--tokenizer", default=None, help="Folder of the tokenizer [the model's].")
    return tokenizer(command)


def sampling_options(command: Command) -> Command:
    """Adds the sampling parameters that every command has."""
    lists = (
        option(_SAMPLING, "--stop", multiple=True, help="String that ends the answer; may be given several times."),
        option(_SAMPLING, "--stop-token-id", "stop_token_ids", type=int, multiple=True, help="The same, a token id."),
        option(_SAMPLING, "--bad-word", "bad_words", multiple=True, help="Text that must not appear; several times."),
        option(_SAMPLING, "--allowed-token-id", "allowed_token_ids", type=int, multiple=True, help=_ALLOWED_HELP),
        option(_SAMPLING, "--logit-bias", multiple=True, callback=_as_bias, metavar="ID=VALUE", help=_BIAS_HELP),
        option(_SAMPLING, "--json-schema", type=click.File(encoding="utf-8"), help="File with the answer's schema."),
        option(_SAMPLING, "--regex", default=None, help="Regular expression that the whole answer matches."),
        option(_SAMPLING, "--choice", multiple=True, help="The answer is one of these; may be given several times."),
        option(_SAMPLING, "--sampling-seed", type=int, default=None, help="The same seed gives the same answer."),
        option(_SAMPLING, "--ignore-eos", is_flag=True, help="Go on past the model's end of sequence."),
        option(_SAMPLING, "--include-stop-str-in-output", is_flag=True, help="Keep the stop string in the text."),
        option(_SAMPLING, "--keep-special-tokens", is_flag=True, help="Show special tokens in the text."),
    )
    for add in reversed(lists):
        command = add(command)
    for name, kind, text in reversed(SAMPLING_OPTIONS):
        command = option(_SAMPLING, _flag(name), name, type=kind, default=None, help=text)(command)
    return command


def _as_bias(_context: click.Context, parameter: click.Parameter, given: Sequence[str]) -> dict[int, float] | None:
    """Several ID=VALUE as a dict, None for none."""
    bias = {}
    for text in given:
        token_id, _, value = text.partition("=")
        try:
            bias[int(token_id)] = float(value)
        except ValueError as error:
            raise click.BadParameter(f"{text!r} is no ID=VALUE, as 42=-1.5", param=parameter) from error
    return bias or None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def taken_engine_options(given: Mapping[str, Any]) -> "EngineOptions":
    """The engine's options among all that a command was given; only those that the user set."""
    names = [name for name, _, _ in ENGINE_OPTIONS]
    return cast("EngineOptions", {name: given[name] for name in names if given[name] not in (None, ())})


def taken_sampling_params(given: Mapping[str, Any], *, max_tokens: int | None = 16, **more: Any) -> "SamplingParams":
    """The sampling parameters among all that a command was given.

    Args:
        given: the command's parameters.
        max_tokens: the command's own default.
        more: parameters that only this command has.

    Raises:
        RequestError: one is out of range.
    """
    from folovllm.common.sampling_params import SamplingParams

    values = {name: given[name] for name, _, _ in SAMPLING_OPTIONS if given[name] is not None}
    return SamplingParams(
        **{"max_tokens": max_tokens, **values, **more},
        seed=given["sampling_seed"],
        stop=list(given["stop"]) or None,
        stop_token_ids=list(given["stop_token_ids"]) or None,
        bad_words=list(given["bad_words"]) or None,
        allowed_token_ids=list(given["allowed_token_ids"]) or None,
        logit_bias=given["logit_bias"],
        structured_outputs=_taken_structure(given),
        ignore_eos=given["ignore_eos"],
        include_stop_str_in_output=given["include_stop_str_in_output"],
        skip_special_tokens=not given["keep_special_tokens"],
    )


def _taken_structure(given: Mapping[str, Any]) -> "StructuredOutputsParams | None":
    from folovllm.common.structured_outputs import StructuredOutputsParams

    schema = None if given["json_schema"] is None else given["json_schema"].read()
    if schema is None and given["regex"] is None and not given["choice"]:
        return None
    return StructuredOutputsParams(json=schema, regex=given["regex"], choice=list(given["choice"]) or None)
