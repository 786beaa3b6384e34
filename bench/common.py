"""What every benchmark shares: the machine in words, a table on stdout, a JSON file in bench/results/."""

import json
import os
import pathlib
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import folovllm

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def machine() -> dict[str, Any]:
    """What a figure must name to mean something: processor, usable cores, memory, versions."""
    info: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "folovllm": folovllm.__version__,
    }
    return info


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_json(name: str, data: dict[str, Any]) -> pathlib.Path:
    """Writes `bench/results/<name>.json`: the machine, the command that was run, and `data`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    command = " ".join(["python -m", f"bench.{pathlib.Path(sys.argv[0]).stem}", *sys.argv[1:]])
    content = {"machine": machine(), "command": command, **data}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(ROOT)}")
    return path


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table with columns as wide as they must be; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(headers), *cells]) for i in range(len(headers))]
    print("  ".join(f"{head:>{width}}" for head, width in zip(headers, widths, strict=True)))
    print("  ".join("-" * width for width in widths))
    for row in cells:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))


def quality_rows(quality: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Of each model in words: perplexity, the same over the first one's, greedy agreement, KL in nats."""
    base = next(iter(quality.values()))["perplexity"]
    return [
        [
            name,
            f"{each['perplexity']:.3f}",
            f"{each['perplexity'] / base:.3f}",
            f"{each['greedy_agreement']:.1%}",
            f"{each['kl']:.4f}",
        ]
        for name, each in quality.items()
    ]
