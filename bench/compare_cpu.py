"""This engine against others on the same CPU: the same weights, prompts and threads, by turns, in one run.

    python -m bench.compare_cpu [--python NAME=INTERPRETER ...] [--rounds 3] [--works decode_1 ...]

Every engine is a process of its own, under an interpreter of its own if need be, and is stopped (SIGSTOP) while another
is measured. Each round goes through all works, and at each work through all engines, which begin in turn. Prompts are
random token ids, new in every round; sampling is greedy; answers have exactly the length asked for. What an engine saw
as prompt is compared with what it was sent. Engines that are not installed are left out and named. With `--bits 4` each
has its own 4-bit form of the same weights: GPTQ in groups of 64 here, Q4_1 in llama.cpp.
"""

import argparse
import itertools
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the package and the fakes, uninstalled

from bench import plots
from bench.common import machine, print_table, write_json
from bench.peers.catalog import KINDS, NO_PEERS, command_for, install_help, is_installed
from bench.peers.figures import limit_of, remarks, tables
from bench.peers.peer import PeerError
from bench.peers.process import ROOT, PeerProcess
from bench.peers.rounds import Rounds, progress
from bench.peers.work import QUICK, WORKS, Work, in_four_bits, prompts_for
from folovllm.common.config import cache_dir, child_environment
from folovllm.common.model_config import read_model_config
from folovllm.frontend.model_hub import resolve

_START_S = 600.0
_ANSWER_S = 900.0
_SHORT = Work("short", "", 1, 8, 8, "output")


class Opening:
    """Opens engines, warms them up, and leaves them stopped until they are asked."""

    def __init__(self, given: argparse.Namespace, model: pathlib.Path, works: Sequence[Work]) -> None:
        self._given = given
        self._model = model
        self._works = works
        self._work_folder = cache_dir() / "bench"
        self.versions: dict[str, str] = {}
        self.first_token_s: dict[str, float] = {}
        self.not_run: dict[str, str] = {}

    @contextmanager
    def opened(self) -> Iterator[dict[str, PeerProcess]]:
        """All engines that can be opened, by name; they end with the block."""
        self._work_folder.mkdir(parents=True, exist_ok=True)
        peers = {}
        with ExitStack() as stack:
            for name in self._given.engines:
                try:
                    peers[name] = self._open(name, stack)
                except PeerError as error:
                    self.not_run[name] = str(error)
                    progress(f"{KINDS[name].title} does not run: {error}")
                else:
                    progress(f"{KINDS[name].title} is open: {self.versions[name]}")
            yield peers

    def _open(self, name: str, stack: ExitStack) -> PeerProcess:
        kind, given = KINDS[name], self._given
        python = given.python.get(name, sys.executable)
        if not is_installed(kind, python):
            raise PeerError(f"its interpreter has no package {kind.package}")
        make_form = kind.form if given.bits == 16 else kind.four_bits
        if make_form is None:
            raise PeerError("it has no 4-bit form here")
        form = pathlib.Path(given.form.get(name) or make_form(self._model, self._work_folder, python))
        sizes = {
            "threads": given.threads,
            "max_model_len": max(work.prompt_len + work.output_len for work in self._works) + 16,
            "max_num_seqs": max(work.num_requests for work in self._works),
        }
        environment = child_environment(str(ROOT)) if kind.is_ours else None
        command = command_for(kind, python, self._model, form, sizes)
        peer = PeerProcess(command, environment, self._work_folder / f"{name}.log")
        stack.callback(peer.stop)
        version = peer.wait_ready(_START_S)
        peer.ask(prompts_for(_SHORT, -1, given.seed), 1, _ANSWER_S)
        self.first_token_s[name] = time.perf_counter() - peer.started_at
        self._warm_up(peer)
        self.versions[name] = version
        return peer

    def _warm_up(self, peer: PeerProcess) -> None:
        """Each work once with a few tokens, and short requests for some seconds: code that is still compiled comes."""
        for i, work in enumerate(self._works):
            few = work._replace(prompt_len=min(work.prompt_len, 1024), output_len=min(work.output_len, 4))
            peer.ask(prompts_for(few, -2 - i, self._given.seed), few.output_len, _ANSWER_S)
        until = time.perf_counter() + self._given.warm_up_s
        for turn in itertools.count(-100, -1):
            if time.perf_counter() >= until:
                break
            peer.ask(prompts_for(_SHORT, turn, self._given.seed), _SHORT.output_len, _ANSWER_S)


def measure_limits(model: pathlib.Path, threads: int) -> dict[str, float]:
    """`bench.peers.limits` in a process of its own."""
    command = [sys.executable, "-m", "bench.peers.limits", str(model), "--threads", str(threads)]
    done = subprocess.run(
        command, cwd=ROOT, env=child_environment(str(ROOT)), check=True, capture_output=True, text=True, timeout=300
    )
    limits: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return limits


def generate_s(model: pathlib.Path, threads: int) -> float:
    """Seconds from the start of `folovllm generate` until its first token stands there and the process has ended."""
    command = [sys.executable, "-m", "folovllm", "generate", "The capital of France is", "--model", str(model)]
    command += ["--max-tokens", "1", "--temperature", "0", "--device", "cpu", "--cpu-threads", str(threads)]
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=_START_S)
    return time.perf_counter() - began


def plot(content: dict[str, Any], name: str, *, quick: bool) -> None:
    """One field for each work: the engines' medians, and the limit as a line."""
    works: list[Work] = content["works"]
    figure, axes = plots.new_figure(len(works))
    for ax, work in zip(axes, works, strict=True):
        rates = {engine: values for engine, values in content["rates"][work.name].items() if engine not in NO_PEERS[1:]}
        order = [engine for engine in KINDS if rates.get(engine)]
        colors = [f"C{list(KINDS).index(engine)}" for engine in order]
        ax.bar(range(len(order)), [statistics.median(rates[engine]) for engine in order], color=colors)
        ax.set_xticks(range(len(order)), labels=[KINDS[each].title for each in order], rotation=30, ha="right")
        limits = [limit for each in content["limits"] if (limit := limit_of(work, each)) is not None]
        if limits:
            ax.axhline(statistics.median(limits), color="gray", linestyle="--")
        plots.label(ax, work.title, "", "tokens/s")
        ax.title.set_fontsize("small")
    figure.set_size_inches(3.0 * len(works), 3.8)
    plots.save(figure, name, quick=quick)


class _ByName(argparse.Action):
    """Collects `NAME=PATH` in a dictionary."""

    def __call__(
        self, parser: argparse.ArgumentParser, given: argparse.Namespace, value: object, _: object = ""
    ) -> None:
        name, _, path = str(value).partition("=")
        if name not in KINDS or not path:
            parser.error(f"{value!r} is not NAME=PATH with NAME one of {', '.join(KINDS)}")
        setattr(given, self.dest, {**vars(given)[self.dest], name: str(pathlib.Path(path).expanduser().absolute())})


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"How the peers are installed, best each in an environment of its own:\n{install_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="demo", help="local folder, hub id, or demo; weights in bfloat16 [demo]")
    parser.add_argument("--engines", nargs="+", choices=list(KINDS), default=list(KINDS), help="who takes part [all]")
    parser.add_argument(
        "--python", action=_ByName, default={}, metavar="NAME=INTERPRETER", help="whose environment has the engine"
    )
    parser.add_argument(
        "--form", action=_ByName, default={}, metavar="NAME=PATH", help="the model as the engine wants it [is made]"
    )
    parser.add_argument("--bits", type=int, choices=[16, 4], default=16, help="of the weights [16]")
    parser.add_argument("--works", nargs="+", choices=[w.name for w in WORKS], default=[w.name for w in WORKS])
    parser.add_argument("--rounds", type=int, default=3, help="rounds; medians are reported [3]")
    parser.add_argument("--threads", type=int, default=2, help="threads of each engine [2]")
    parser.add_argument("--warm-up-s", type=float, default=5.0, help="seconds of requests before the first round [5]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts [0]")
    parser.add_argument("--result", default="compare_cpu", help="name of the result's file [compare_cpu]")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    return parser


def shown_command(given: argparse.Namespace) -> str:
    """The command without the paths of this machine."""
    named = [*given.python.items(), *given.form.items()]
    shown = {word: f"{name}=PATH" for word in sys.argv[1:] for name, _ in named if word.startswith(f"{name}=")}
    words = [shown.get(word, word) for word in sys.argv[1:]]
    return " ".join(["python -m bench.compare_cpu", *words])


def result(
    given: argparse.Namespace, opening: Opening, rounds: Rounds, measured: dict[str, list[Any]]
) -> dict[str, Any]:
    """What the result's file holds beside the machine."""
    return {
        "command": shown_command(given),
        "rounds": len(measured["limits"]),
        "threads": given.threads,
        **rounds.result(),
        "limits": measured["limits"],
        "versions": opening.versions,
        "not_run": opening.not_run,
        "starts": {"generate_s": measured["generate_s"], "first_token_s": opening.first_token_s},
    }


def end_in_order() -> None:
    """SIGTERM ends with the engines stopped, as Ctrl-C does: who stands still would stay in memory for ever."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def main() -> None:
    parser = options()
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds} must be at least 1")
    model = resolve(given.model)
    read_model_config(model)  # says at once if this engine cannot take it
    if given.quick:
        given.rounds, given.warm_up_s = 1, 0.0
    works = [work for work in (QUICK if given.quick else WORKS) if work.name in given.works]
    if given.bits == 4:
        works = in_four_bits(works)
    end_in_order()
    opening = Opening(given, model, works)
    name = given.result + ("-quick" if given.quick else "")
    measured: dict[str, list[Any]] = {"limits": [], "generate_s": []}
    content: dict[str, Any] = {}
    with opening.opened() as peers:
        rounds = Rounds(peers, works, given.seed)
        for turn in range(given.rounds):
            measured["limits"].append(measure_limits(model, given.threads))
            if given.bits == 16 and (model / "tokenizer.json").exists():
                measured["generate_s"].append(generate_s(model, given.threads))
            rounds.run(turn)
            content = result(given, opening, rounds, measured)
            write_json(name, content)  # each round anew: a run that is broken off has something to show
    print(machine()["processor"])
    for table in tables(content):
        print(f"\n{table.title}")
        print_table(table.headers, table.rows)
    print("", *remarks(content), sep="\n")
    plot(content, name, quick=given.quick)


if __name__ == "__main__":
    main()
