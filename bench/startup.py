"""Warm start: seconds from starting Python to the first token, by `LLM(model)` and `folovllm generate`.

Every measurement is a process of its own, since only a first import and a first start count; the two kinds of start
come by turns. The engine's table must explain all but 0.3 s of the time to the first token of `LLM(model)`. Run it as

    python -m bench.startup --model demo
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, astuple, dataclass

import msgspec

from bench import plots
from bench.common import ROOT, machine, print_table, write_json
from bench.workload import parser
from folovllm.common.messages.lifecycle import PhaseTime
from folovllm.frontend.startup_table import StartupReport

EXPLAINED_TO_S = 0.3
IMPORT_LIMIT_MS = 50.0
TOKEN_LIMIT_S = 8.0
GENERATE_LIMIT_S = 3.0

_PROMPT = "The capital of France is"

# What a user's script does. Clocks are the system's, so that they can be compared with the parent's.
_CHILD = """
import json, sys, time
began = time.time()
import folovllm
imported = time.time()
from folovllm import LLM, SamplingParams
loaded = time.time()
with LLM(sys.argv[1], dtype=sys.argv[2], device=sys.argv[3]) as llm:
    ready = time.time()
    first = next(iter(llm.stream(sys.argv[4], SamplingParams(max_tokens=4, ignore_eos=True))))
    token = time.time()
    phases = [[p.process, p.phase, p.start_s, p.seconds] for p in llm.startup.phases]
    times = dict(began=began, imported=imported, loaded=loaded, ready=ready, token=token)
    print(json.dumps(dict(times=times, wall_s=llm.startup.wall_s, phases=phases)))
"""

_IMPORT = "import time; a = time.perf_counter(); import folovllm; print(time.perf_counter() - a)"


@dataclass(frozen=True)
class Start:
    """One start, in seconds from the start of Python's process.

    Attributes:
        token_s: until the first token was there.
        unexplained_s: seconds of these in which no process was in a phase of the table.
        report: the engine's table, with the phases of the script around it.
    """

    token_s: float
    unexplained_s: float
    report: StartupReport


def start_once(model: str, dtype: str, device: str) -> Start:
    """Starts a process that starts an engine and asks for a token."""
    launched = time.time()
    command = [sys.executable, "-c", _CHILD, model, dtype, device, _PROMPT]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    said = json.loads(done.stdout.splitlines()[-1])
    at = {name: moment - launched for name, moment in said["times"].items()}
    engine_began = at["ready"] - said["wall_s"]
    phases = [PhaseTime(process, phase, engine_began + begin, s) for process, phase, begin, s in said["phases"]]
    around = [
        PhaseTime("script", "start Python", 0.0, at["began"]),
        PhaseTime("script", "import folovllm", at["began"], at["imported"] - at["began"]),
        PhaseTime("script", "load the frontend's modules", at["imported"], at["loaded"] - at["imported"]),
        PhaseTime("script", "first token", at["ready"], at["token"] - at["ready"]),
    ]
    report = StartupReport([*around, *phases], [], at["token"])
    return Start(at["token"], report.unexplained_s, report)


@dataclass(frozen=True)
class Command:
    """One run of a command, in seconds from the start of its process.

    Attributes:
        printed_s: until its first line came out of it.
        ended_s: until it had ended.
    """

    printed_s: float
    ended_s: float


def generate_once(model: str, dtype: str, device: str) -> Command:
    """Runs `folovllm generate` for one token."""
    command = [sys.executable, "-m", "folovllm", "generate", _PROMPT, "--model", model, "--dtype", dtype]
    return timed([*command, "--device", device, "--max-tokens", "1", "--temperature", "0"])


def timed(command: list[str]) -> Command:
    """Runs a command that prints a line.

    Raises:
        RuntimeError: it failed, or printed nothing.
    """
    launched = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        text = process.stdout.readline()
        printed_s = time.perf_counter() - launched
    if process.returncode or not text:
        raise RuntimeError(f"{command[1:4]} ended with exit code {process.returncode} and printed {text!r}")
    return Command(printed_s, time.perf_counter() - launched)


def import_ms(times: int) -> float:
    """Median milliseconds of `import folovllm` in a fresh interpreter."""
    command = [sys.executable, "-c", _IMPORT]
    outputs = [subprocess.run(command, check=True, capture_output=True, text=True, timeout=60) for _ in range(times)]
    return statistics.median(float(done.stdout) for done in outputs) * 1e3


def plot(start: Start, *, quick: bool) -> None:
    """When each phase of each process ran."""
    figure, (ax,) = plots.new_figure()
    phases = sorted(start.report.phases, key=lambda phase: phase.start_s)
    colors = {process: f"C{i}" for i, process in enumerate(dict.fromkeys(phase.process for phase in phases))}
    for row, phase in enumerate(phases):
        ax.barh(row, phase.seconds, left=phase.start_s, color=colors[phase.process])
    ax.set_yticks(range(len(phases)), labels=[f"{phase.process}: {phase.phase}" for phase in phases], fontsize=7)
    ax.invert_yaxis()
    figure.set_size_inches(8.0, 1.5 + 0.2 * len(phases))
    plots.label(ax, "Warm start to the first token", "seconds since Python was started", "")
    plots.save(figure, "startup", quick=quick)


def main() -> None:
    options = parser("Warm start to the first token.")
    options.set_defaults(dtype="auto")
    arguments = options.parse_args()
    repeats = 1 if arguments.quick else arguments.repeats
    start_once(arguments.model, arguments.dtype, arguments.device)  # converts the demo model, fills the page cache
    starts, commands = [], []
    for _ in range(repeats):
        starts.append(start_once(arguments.model, arguments.dtype, arguments.device))
        commands.append(generate_once(arguments.model, arguments.dtype, arguments.device))
    printed_s, ended_s = (statistics.median(times) for times in zip(*map(astuple, commands), strict=True))
    median = sorted(starts, key=lambda start: start.token_s)[len(starts) // 2]
    milliseconds = import_ms(2 if arguments.quick else 11)
    print(median.report.table())
    rows = [
        ["import folovllm, ms", f"{milliseconds:.1f}", f"{IMPORT_LIMIT_MS:.0f}"],
        ["first token of LLM(model), s", f"{median.token_s:.2f}", f"{TOKEN_LIMIT_S:.0f}"],
        ["first token of folovllm generate, s", f"{printed_s:.2f}", f"{GENERATE_LIMIT_S:.0f}"],
        ["folovllm generate for one token, until it has ended, s", f"{ended_s:.2f}", ""],
        ["not explained by the table, s", f"{median.unexplained_s:.2f}", f"{EXPLAINED_TO_S}"],
    ]
    print(f"\n{machine()['processor']}")
    print_table(["figure (median)", "measured", "at most"], rows)
    result = {
        "import_ms": milliseconds,
        "first_token_s": median.token_s,
        "unexplained_s": median.unexplained_s,
        "all_first_token_s": [start.token_s for start in starts],
        "generate_first_token_s": printed_s,
        "generate_ended_s": ended_s,
        "all_generate": [asdict(command) for command in commands],
        "phases": [msgspec.structs.asdict(phase) for phase in median.report.phases],
    }
    write_json("startup-quick" if arguments.quick else "startup", {"result": result})
    plot(median, quick=arguments.quick)


if __name__ == "__main__":
    main()
