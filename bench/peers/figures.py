"""From the rounds' rates to medians, ratios, shares of the limits, and the tables that show them."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bench.peers.catalog import KINDS, NO_PEERS
from bench.peers.work import Work

OVERHEAD_GOALS = {"decode_1": 0.04, "batch_64": 0.08}
START_GOAL_S = 3.0


class Table(NamedTuple):
    """A title, the heads of the columns and the rows, as text."""

    title: str
    headers: list[str]
    rows: list[list[str]]


def best_peer(rates: Mapping[str, Sequence[float]]) -> str | None:
    """The fastest other engine by its median; None if there is none."""
    medians = {name: statistics.median(values) for name, values in rates.items() if name not in NO_PEERS and values}
    return max(medians, key=lambda name: medians[name]) if medians else None


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of each round's own ratio."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def limit_of(work: Work, limits: Mapping[str, float]) -> float | None:
    """The tokens/s that the machine allows; None where nothing simple tells them."""
    if work.limit == "products":
        return limits["products_tokens_per_s"]
    if not work.limit:
        return None
    read = limits["weight_bytes"]
    if work.limit == "weights and KV":
        read += limits["kv_bytes_per_token"] * work.mean_context
    return limits["read_weights_gb_per_s"] * 1e9 / read


def rates_table(content: Mapping[str, Any], works: Sequence[Work]) -> Table:
    """Median tokens/s of each engine at each work."""
    names = [name for name in KINDS if any(content["rates"][work.name].get(name) for work in works)]
    rows = []
    for name in names:
        values = [content["rates"][work.name].get(name) for work in works]
        shown = [f"{statistics.median(each):,.1f}" if each else "–" for each in values]
        rows.append([KINDS[name].title, *shown])
    return Table("Tokens/s, medians", ["engine", *(work.title for work in works)], rows)


def ratios_table(content: Mapping[str, Any], works: Sequence[Work]) -> Table:
    """This engine against the best peer and against the limit, with the goals."""
    rows = []
    for work in works:
        rates = content["rates"][work.name]
        mine, best = rates.get("own", []), best_peer(rates)
        ratio = f"{median_ratio(mine, rates[best]):.2f}" if best and mine else "–"
        limits = [limit for each in content["limits"] if (limit := limit_of(work, each)) is not None]
        share = f"{median_ratio(mine, limits):.0%}" if limits and mine else "–"
        goals = [f"{work.ratio_goal}" if work.ratio_goal else "–", f"{work.share_goal:.0%}" if work.share_goal else "–"]
        allowed = f"{statistics.median(limits):,.1f}" if limits else "–"
        rows.append([work.title, KINDS[best].title if best else "–", ratio, goals[0], allowed, share, goals[1]])
    headers = ["work", "best peer", "FoloVLLM is faster by", "goal", "limit, tokens/s", "share of the limit", "goal"]
    return Table("Ratios, medians of the rounds' own", headers, rows)


def overhead_table(content: Mapping[str, Any], works: Sequence[Work]) -> Table:
    """What `LLM.generate` takes beyond its worker alone."""
    rows = []
    for work in works:
        mine, bare = (content["rates"][work.name].get(name) for name in ("own", "bare"))
        if mine and bare and work.name in OVERHEAD_GOALS:
            goal = OVERHEAD_GOALS[work.name]
            rows.append([work.title, f"{1 - median_ratio(mine, bare):.1%}", f"{goal:.0%}"])
    return Table("LLM.generate against its worker alone", ["work", "slower by", "goal"], rows)


def start_table(content: Mapping[str, Any]) -> Table:
    """Seconds from the start of a process to its first token."""
    rows = []
    if content["starts"]["generate_s"]:
        seconds = statistics.median(content["starts"]["generate_s"])
        rows.append(["`folovllm generate`, whole process, median", f"{seconds:.2f}", f"{START_GOAL_S:.0f}"])
    titles = {name: KINDS[name].title for name in content["starts"]["first_token_s"]}
    rows += [[titles[name], f"{seconds:.2f}", "–"] for name, seconds in content["starts"]["first_token_s"].items()]
    return Table("Start to first token", ["process", "seconds", "goal"], rows)


def machine_table(content: Mapping[str, Any]) -> Table:
    """The machine's own rates."""

    limits: list[dict[str, float]] = content["limits"]

    def median(name: str) -> float:
        return statistics.median(each[name] for each in limits)

    rows = [
        [
            f"reads of {median('weight_bytes') / 1e6:,.0f} MB, the weights' size",
            f"{median('read_weights_gb_per_s'):.1f} GB/s",
        ],
        ["reads of 2 GiB", f"{median('read_memory_gb_per_s'):.1f} GB/s"],
        ["the linear layers' products, 1,024 rows", f"{median('products_gflop_per_s'):,.0f} GFLOP/s"],
        ["a product of 2,048 × 2,048 × 2,048", f"{median('square_gflop_per_s'):,.0f} GFLOP/s"],
    ]
    return Table("The machine, bfloat16, each in the fastest form", ["what", "rate"], rows)


def tables(content: Mapping[str, Any]) -> list[Table]:
    """All that a result shows; tables without rows are left out."""
    works = [Work(*row) for row in content["works"]]
    parts = [rates_table(content, works), ratios_table(content, works), overhead_table(content, works)]
    return [table for table in [*parts, start_table(content), machine_table(content)] if table.rows]


def remarks(content: Mapping[str, Any]) -> list[str]:
    """Versions, what did not run and why, and how far first tokens agree."""
    said = [f"{KINDS[name].title}: {version}" for name, version in content["versions"].items()]
    said += [f"{KINDS[name].title} did not run: {why}" for name, why in content["not_run"].items()]
    for work, failed in content["failed"].items():
        said += [f"{KINDS[name].title} failed at {work}: {why}" for name, why in failed.items()]
    agreed = content["agreement"]
    said += [f"{KINDS[name].title}: {share:.0%} of first tokens are FoloVLLM's" for name, share in agreed.items()]
    return said
