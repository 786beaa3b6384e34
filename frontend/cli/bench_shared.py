"""What the commands of `folovllm bench` share."""

import importlib.util
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from folovllm.frontend.benchmark.workload import CountTokens, Work

DATASETS = ("random", "sharegpt", "sharegpt-like")


def need_libraries(names: Sequence[str]) -> None:
    """Raises ConfigError where one is not installed."""
    from folovllm.common.errors import ConfigError

    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"{name} is not installed; this needs the extra 'bench': pip install 'folovllm[bench]', or "
                "pip install -e '.[bench]' in a checkout"
            )


def taken_percentiles(given: str) -> list[float]:
    """`50,90,99` as numbers."""
    try:
        percentiles = [float(text) for text in given.split(",")]
    except ValueError as error:
        raise click.UsageError(f"{given!r} are no percentiles; write numbers with commas, such as 50,99") from error
    if wrong := [percent for percent in percentiles if not 0 < percent < 100]:
        raise click.UsageError(f"percentile {wrong[0]:g} must lie between 0 and 100")
    return percentiles


def save_json(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Writes a result, in a folder that is made where it is missing. Raises ConfigError."""
    from folovllm.common.errors import ConfigError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the result cannot be written: {error}") from error
    click.echo(f"wrote {path}")


def check_dataset(given: Mapping[str, Any], names: Mapping[str, Mapping[str, str]]) -> None:
    """Raises UsageError where an option was given that the chosen dataset has no use for, or lacks its file.

    Args:
        given: the command's parameters; `dataset_name` is one of `DATASETS`, those of datasets are None if not given.
        names: dataset → what it takes → the parameter of this command.
    """
    chosen = given["dataset_name"]
    for dataset, parameters in names.items():
        for parameter in parameters.values():
            if given[parameter] is not None and parameter not in names[chosen].values():
                flag = "--" + parameter.replace("_", "-")
                raise click.UsageError(f"{flag} goes with --dataset-name {dataset}, not with {chosen}")
    if "path" in names[chosen] and given[names[chosen]["path"]] is None:
        raise click.UsageError("--dataset-name sharegpt reads a file: give --dataset-path, or take sharegpt-like")


def make_works(
    given: Mapping[str, Any],
    names: Mapping[str, Mapping[str, str]],
    *,
    seed: int,
    count_tokens: "CountTokens | None",
) -> "list[Work]":
    """What is asked, as the command's parameters say; `check_dataset` has seen them. Raises ConfigError."""
    from folovllm.frontend.benchmark.workload import RandomLengths, random_works, sharegpt_like_works, sharegpt_works

    dataset, count = given["dataset_name"], given["num_prompts"]
    values = {name: given[parameter] for name, parameter in names[dataset].items() if given[parameter] is not None}
    if dataset == "random":
        return random_works(count, RandomLengths(**values), seed)
    if dataset == "sharegpt-like":
        return sharegpt_like_works(count, seed)
    return sharegpt_works(values["path"], count, seed, output_len=values.get("output_len"), count_tokens=count_tokens)
