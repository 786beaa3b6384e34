"""The process of one peer: opens it, then answers a line of JSON with a line of JSON until its input ends.

    python -m bench.peers.worker NAME --model FOLDER --form PATH --threads 2 [--max-model-len 8192] [--max-num-seqs 64]

It runs under the peer's own interpreter, so it and the peers' files import nothing but the standard library and the
peer. Questions are `{"prompts": [[ids]], "num_tokens": n}`; answers the fields of `peer.Answer`, or `{"error": text}`.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from bench.peers.peer import Options, Peer


def serve(open_peer: Callable[[], Peer], questions: Iterable[str], say: Callable[[dict[str, Any]], None]) -> None:
    """The whole life of a worker. A question that fails is answered with its error; the next one is taken."""
    try:
        peer = open_peer()
    except Exception as error:  # noqa: BLE001 - told to the parent, whose other peers go on
        say({"error": _text(error)})
        return
    say({"version": peer.version})
    for line in questions:
        question = json.loads(line)
        try:
            say(peer.answer(question["prompts"], question["num_tokens"])._asdict())
        except Exception as error:  # noqa: BLE001 - the same
            say({"error": _text(error)})


def _text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def own_stdout() -> TextIO:
    """What was standard output, for answers alone: from now on what libraries print goes to standard error."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a file beside this one: bench/peers/NAME.py")
    parser.add_argument("--model", required=True)
    parser.add_argument("--form", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-seqs", type=int)
    given = vars(parser.parse_args())
    name = given.pop("name")
    answers = own_stdout()

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    serve(lambda: importlib.import_module(f"bench.peers.{name}").open_peer(Options(**given)), sys.stdin, say)


if __name__ == "__main__":
    main()
