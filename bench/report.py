"""Writes the figures of bench/results/*.json into docs/performance.md, between its markers.

A section stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; one without a result is left as it is. Run it as

    python -m bench.report
"""

import argparse
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from bench import gpu_report
from bench.common import RESULTS, quality_rows
from bench.peers.figures import remarks, tables

FIGURES = {
    "m1": ("m1_one_request", "Gaps between the tokens of one request"),
    "m2": ("m2_continuous_batching", "Output tokens per second over the number of requests at once"),
    "m3": ("m3_kv_memory", "Tokens reserved and held over a run"),
    "m5": ("m5_chunked_prefill", "The streams' worst gaps against the wait for the prompt's first token"),
    "m6": ("m6_prefix_reuse", "A conversation with and without the prefix cache"),
    "m7": ("m7_gptq", "Tokens per second with 16-bit and 4-bit weights, and what 4 bits cost in perplexity"),
    "compare_cpu": ("compare_cpu", "Tokens per second of each engine; dashed: what the machine allows"),
    "compare_cpu_qwen3": ("compare_cpu_qwen3", "The same for Qwen3-0.6B's shape"),
    "compare_cpu_4bit": ("compare_cpu_4bit", "Tokens per second with 4-bit weights"),
    "startup": ("startup", "When each phase of the start ran"),
}
PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "performance.md"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def m1(result: dict[str, Any]) -> str:
    rows = [
        ["time to first token", f"{result['ttft_ms']:.1f} ms"],
        ["time per output token", f"{result['tpot_ms']:.1f} ms"],
        ["gap between tokens, 50th / 99th percentile", f"{result['gap_p50_ms']:.1f} / {result['gap_p99_ms']:.1f} ms"],
        ["end to end", f"{result['e2e_ms']:.0f} ms"],
        ["output tokens/s", f"{result['output_tokens_per_s']:.1f}"],
        ["rate at which decoding reads the weights", f"{result['weights_read_gb_per_s']:.1f} GB/s"],
    ]
    size = result["sizes"]
    return table([f"one request, {size['prompt_len']} + {size['output_len']} tokens", "median"], rows)


def m2(result: dict[str, Any]) -> str:
    sweep = result["continuous_tokens_per_s"]
    counts = table(["requests at once", *sweep], [["output tokens/s", *(f"{value:.0f}" for value in sweep.values())]])
    rates = result["tokens_per_s"]
    rows = [["continuous batching", f"{rates['continuous']:.1f}", "", ""]]
    for name, way, goal in (
        ("one by one", "one_by_one", "4"),
        ("transformers' generate, one padded batch", "transformers", "2.5"),
    ):
        rows.append([name, f"{rates[way]:.1f}", f"{result[f'ratio_{way}']:.2f} times", f"{goal} times"])
    compared = table(["16 requests", "output tokens/s", "continuous is faster by", "goal"], rows)
    return f"{counts}\n\n{compared}"


def m3(result: dict[str, Any]) -> str:
    rows = [
        [
            way,
            f"{result['bytes_reserved'][way] / 2**20:,.1f}",
            f"{result['bytes_used'] / 2**20:,.1f}",
            f"{result['used_share'][way]:.1%}",
            result["requests_in_budget"][way],
        ]
        for way in ("contiguous", "paged")
    ]
    headers = ["", "MiB reserved", "MiB used", "used share", f"requests in {result['budget_mib']} MiB"]
    head = f"{result['num_running']} requests in work, {result['bytes_per_token']:,} bytes a token, "
    lowest = min(reading["tokens_used"] / reading["tokens_reserved"] for reading in result["readings"])
    foot = f"Lowest used share of the paged way in {len(result['readings'])} readings over the whole run: {lowest:.1%}."
    return f"{head}contiguous: {result['max_model_len']:,} tokens each\n\n{table(headers, rows)}\n\n{foot}"


def m5(result: dict[str, Any]) -> str:
    names = ("gap_p50_ms", "gap_p99_ms", "gap_max_ms", "ttft_ms")
    rows = [[name, *(f"{row[each]:.0f}" for each in names)] for name, row in result["rows"].items()]
    headers = ["", "gap p50, ms", "gap p99, ms", "gap max, ms", "first token of the prompt, ms"]
    figures = table(headers, rows)
    targets = [
        [
            f"{each['target_ms']:.0f} ms",
            f"{each['p99_of_target']:.2f}",
            ", ".join(f"{ratio:.2f}" for ratio in each["p99_of_target_by_round"]),
            f"{each['late']:.1%}",
            f"{each['ttft_of_best_chunk']:.2f} (chunks of {each['best_chunk']})"
            if each["best_chunk"]
            else "no fixed chunk is as smooth",
        ]
        for each in result["targets"]
    ]
    compared = table(
        [
            "target",
            "p99 of the target (goal 1.3)",
            "in each round",
            "gaps above 1.3 times the target",
            "first token, of the best fixed chunk as smooth (goal 1.25)",
        ],
        targets,
    )
    lost = f"Throughput lost to chunks at no target: {result['throughput']['lost']:.1%} (goal 5 %)."
    head = f"{result['num_streams']} streams while a prompt of {result['prompt_len']:,} tokens arrives"
    return f"{head}\n\n{figures}\n\n{compared}\n\n{lost}"


def m6(result: dict[str, Any]) -> str:
    system, many, nothing = result["shared_prefix"], result["many_sharing"], result["nothing_shared"]
    sizes = result["sizes"]
    rows = [
        ["time to first token, cold", f"{system['cold_ms']:.0f} ms", ""],
        ["time to first token, warm", f"{system['warm_ms']:.0f} ms, {system['ratio']:.3f} of cold", "0.15"],
        [
            f"{sizes['num_sharing']} requests at once, each {sizes['output']} tokens",
            f"{many['faster']:.1f} times the requests/s, {many['hit_rate']:.0%} of prompt tokens found",
            "3 times",
        ],
        ["the core's work for the cache where nothing is shared, of the whole time", f"{nothing['cost']:.2%}", "3 %"],
    ]
    head = f"{sizes['prefix']:,} shared tokens and {sizes['own']} of one's own"
    turns = [[f"{value:.0f}" for value in row.values()] for row in result["multi_turn"]]
    headers = ["turn", "prompt tokens", "found", "first token, ms", "without the cache, ms"]
    return f"{table([head, 'median', 'goal'], rows)}\n\n{table(headers, turns)}"


def m7(result: dict[str, Any]) -> str:
    memory, speed, quality = result["memory"], result["tokens_per_s"], result["quality"]
    names = list(memory)
    rows: list[list[object]] = []
    for key, what, unit in (
        ("weight_bytes", "weights, MB", 1e6),
        ("worker_resident_bytes", "worker process, MB", 1e6),
        ("load_s", "load of the weights, s", 1.0),
    ):
        values = [memory[name][key] / unit for name in names]
        rows.append([what, *(f"{value:,.2f}" for value in values), f"{values[1] / values[0]:.2f}"])
    for count in speed[names[0]]:
        rates = [speed[name][count] for name in names]
        rows.append([f"tokens/s, {count} at once", *(f"{rate:,.1f}" for rate in rates), f"{rates[1] / rates[0]:.2f}"])
    costs = quality_rows(quality)
    scheme = result["scheme"]
    grid = f"{scheme['bits']} bits, group {scheme['group_size']}, {'' if scheme['sym'] else 'a'}symmetric"
    text = f"{result['tokens']:,} tokens of {result['text']}"
    quality_table = table([grid, "perplexity", "ratio", "same greedy token", "KL, nats"], costs)
    return f"{table(['', *names, 'ratio'], rows)}\n\n{text}:\n\n{quality_table}"


def startup(result: dict[str, Any]) -> str:
    rows = [
        ["`import folovllm`", f"{result['import_ms']:.1f} ms", "50 ms"],
        ["warm start to the first token of `LLM(model)`", f"{result['first_token_s']:.2f} s", "8 s"],
        ["of these, in no phase of the table", f"{result['unexplained_s']:.2f} s", "0.3 s"],
        ["of `folovllm generate`, as it is printed", f"{result['generate_first_token_s']:.2f} s", "3 s"],
        ["the same until the process has ended", f"{result['generate_ended_s']:.2f} s", ""],
    ]
    phases = [
        [phase["process"], phase["phase"], f"{phase['start_s']:.2f}", f"{phase['seconds']:.2f}"]
        for phase in sorted(result["phases"], key=lambda phase: phase["start_s"])
    ]
    goals = table(["figure", "median", "goal"], rows)
    return goals + "\n\n" + table(["process", "phase", "begins at s", "seconds"], phases)


def core_step(content: dict[str, Any]) -> str:
    parts, sockets = content["parts"], content["sockets"]
    headers = [name if name in ("requests", "depth") else f"{name.removesuffix('_us')}, µs" for name in parts[0]]
    alone = table(headers, [list(row.values()) for row in parts])
    through = table(["requests", "depth", "step, µs", "99th percentile, µs"], [list(row.values()) for row in sockets])
    return (
        f"Core time for one decode step, without sockets (median):\n\n{alone}\n\n"
        f"From one step's tokens to the next, real processes, as a frontend sees it:\n\n{through}"
    )


def grammar(content: dict[str, Any]) -> str:
    masks = content["masks"]
    rows = [
        [f"one mask, {masks['vocabulary']:,} tokens, median", f"{masks['mask_median_us']:.0f} µs", "200 µs"],
        ["99th percentile", f"{masks['mask_p99_us']:.0f} µs", ""],
        [f"compiling one of {masks['schemas']} schemas, median", f"{masks['compile_median_ms']:.1f} ms", ""],
        ["reading the vocabulary, once, beside the worker's start", f"{masks['vocabulary_s']:.2f} s", ""],
    ]
    steps = [list(row.values()) for row in content["steps"]]
    headers = ["of 256 requests with a grammar", "depth", "core step, µs", "99th percentile, µs"]
    return f"{table(['figure', 'measured', 'goal'], rows)}\n\n{table(headers, steps)}"


def compare_cpu(content: dict[str, Any]) -> str:
    shown = [f"{part.title}:\n\n{table(part.headers, part.rows)}" for part in tables(content)]
    return "\n\n".join([*shown, "\n".join(f"* {remark}" for remark in remarks(content))])


def cpu_decode(result: dict[str, Any]) -> str:
    limit = (
        f"{result['threads']} threads read {result['read_gb_per_s']} GB/s: the weights' "
        f"{result['weight_bytes'] / 1e6:.0f} MB take {result['limit_ms']} ms."
    )
    rows = result["rows"]
    headers = ["requests", "`LLM.generate`, tokens/s", "ms a step", "of the limit", "bare step, ms", "of the limit"]
    first = [
        [
            row["requests"],
            row["engine_tokens_per_s"],
            row["engine_ms"],
            f"{row['engine_percent_of_limit']} %",
            row["step_ms"],
            f"{row['step_percent_of_limit']} %",
        ]
        for row in rows
    ]
    parts = ["products", "attention", "logits", "rest", "torch"]
    second = [[row["requests"], row["step_ms"], *(row[f"{part}_ms"] for part in parts)] for row in rows]
    names = ["requests", "bare step, ms", *parts[:-1], "by torch's operators"]
    return f"{limit}\n\n{table(headers, first)}\n\n{table(names, second)}"


def of_result(section: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    return lambda content: section(content["result"])


def engine_overhead(result: dict[str, Any]) -> str:
    size, goals = result["options"], result["goals_percent"]
    rows = [
        [
            point["batch"],
            f"{point['bare_ms']:.2f}",
            f"{point['engine_ms']:.2f}",
            f"{point['overhead_percent']:+.1f} %",
            f"{goals[batch]:.0f} %" if (batch := str(point["batch"])) in goals else "",
        ]
        for point in result["points"]
    ]
    head = f"{size['prompt_len']} + {size['output_len']} tokens each, {size['model']} model, {size['dtype']}"
    names = ["requests", "bare step, ms", "step of LLM.generate, ms", "overhead", "goal"]
    return f"{head}\n\n{table(names, rows)}"


def server_overhead(result: dict[str, Any]) -> str:
    rows = [
        [what, name.replace("_", " "), f"{value:,.1f}"]
        for what, values in result["results"].items()
        for name, value in values.items()
    ]
    return table(["what", "figure", "value"], rows)


def server_streams(result: dict[str, Any]) -> str:
    size = result["options"]
    rows = [
        [
            point["streams"],
            *(f"{point[f'{way}_tokens_per_s']:.0f}" for way in ("offline", "http")),
            f"{point['share']:.2f}",
        ]
        for point in result["points"]
    ]
    head = f"{size['prompt_len']} + {size['output_len']} tokens each, {size['model']} model"
    return f"{head}\n\n{table(['streams', 'LLM.generate, tokens/s', 'HTTP, tokens/s', 'share'], rows)}"


def client_events(result: dict[str, Any]) -> str:
    rows = [
        [
            point["streams"],
            *(f"{point[name]:,.0f}" for name in ("events_per_s", "paced_events_per_s", "paced_reads_per_s")),
            f"{point['delay_p50_ms']:.2f}",
            f"{point['delay_p99_ms']:.2f}",
        ]
        for point in result["points"]
    ]
    headers = ["streams", "events/s", "paced: events/s", "reads/s", "delay, median, ms", "99th percentile, ms"]
    return table(headers, rows)


def soak(result: dict[str, Any]) -> str:
    rows = [
        [role, f"{values[1]:.1f}", f"{max(values[2:]):.1f}", f"{result['growth_percent'][role]:.2f} %"]
        for role, values in result["rss_mib"].items()
    ]
    head = f"MiB after 2,000 of {result['requests']:,} requests"
    return table(["process", head, "most after that", "growth (goal: below 3 %)"], rows)


def mutated_bodies(result: dict[str, Any]) -> str:
    statuses = ", ".join(f"{count:,} × {status}" for status, count in result["statuses"].items())
    rows = [
        [f"answers to {result['bodies']:,} bodies", statuses],
        ["longest error", f"{result['longest_error_bytes']} bytes"],
        ["memory from the 2,000th to the last", f"{result['rss_growth_percent']:+.1f} %"],
    ]
    return table(["what", "figure"], rows)


def kv_quality(content: dict[str, Any]) -> str:
    result, size = content["result"], content["options"]
    figures = result["figures"]
    rows = [
        ["error of the logits, of their norm", f"{figures['relative error of logits']:.1%}"],
        ["same greedy token", f"{figures['same greedy token']:.1%}"],
        ["KL of the next token's distribution", f"{figures['KL, nats']:.4f} nats"],
        ["perplexity", f"{figures['perplexity']:.3f} → {figures['perplexity, FP8']:.3f}"],
    ]
    head = f"{result['tokens']:,} tokens of {result['text']}, {size['model']} model, {size['dtype']}"
    return f"{head}\n\n{table(['with an FP8 KV cache', 'measured'], rows)}"


def on_gpu(section: Callable[[dict[str, Any], gpu_report.Table], str]) -> Callable[[dict[str, Any]], str]:
    return lambda content: section(content, table)


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "m1": of_result(m1),
    "m2": of_result(m2),
    "m3": of_result(m3),
    "m5": of_result(m5),
    "m6": of_result(m6),
    "m7": of_result(m7),
    "startup": of_result(startup),
    "cpu_decode": of_result(cpu_decode),
    "core_step": core_step,
    "grammar": grammar,
    "engine_overhead": engine_overhead,
    "server_overhead": server_overhead,
    "compare_cpu": compare_cpu,
    "compare_cpu_qwen3": compare_cpu,
    "compare_cpu_4bit": compare_cpu,
    "soak": of_result(soak),
    "mutated_bodies": of_result(mutated_bodies),
    "server_streams": server_streams,
    "client_events": client_events,
    "kv_quality": kv_quality,
    "gpu": on_gpu(gpu_report.gpu),
    "gpu_4bit": on_gpu(gpu_report.four_bits),
    "gpu_steps": on_gpu(gpu_report.gpu_steps),
}


def render(name: str, content: dict[str, Any]) -> str:
    """One section's text: command, machine, tables, and the figure if it was drawn."""
    machine = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
    text = f"`{content['command']}` · {machine}\n\n{SECTIONS[name](content)}"
    file, shows = FIGURES.get(name, ("", ""))
    return f"{text}\n\n![{shows}](figures/{file}.png)" if (PAGE.parent / f"figures/{file}.png").exists() else text


def fill(page: str, name: str, text: str) -> str:
    """The page with `text` between the markers of `name`.

    Raises:
        ValueError: the page does not have these markers exactly once.
    """
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    filled, count = pattern.subn(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page)
    if count != 1:
        raise ValueError(f"{PAGE.name} has the markers of {name} {count} times instead of once")
    return filled


def main() -> None:
    argparse.ArgumentParser(description="Writes bench/results/*.json into docs/performance.md.").parse_args()
    page = PAGE.read_text(encoding="utf-8")
    for name in SECTIONS:
        path = RESULTS / f"{name}.json"
        if path.exists():
            page = fill(page, name, render(name, json.loads(path.read_text(encoding="utf-8"))))
            print(f"{name}: filled in")
        else:
            print(f"{name}: no result, left as it is")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
