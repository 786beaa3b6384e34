"""10,000 bodies that are almost right, through the application in this process: every one is answered, memory is flat.

    python -m bench.mutated_bodies [--bodies 10000]

A fake core answers what is valid. A body that is refused is a 400, 404, 413 or 422 of less than 10 kB that names the
field. The tests do the same with some hundred bodies; here are enough to see a leak.
"""

import argparse
import asyncio
import pathlib
import random
import sys
import tempfile
from collections import Counter
from typing import Any

import psutil

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the package and the fakes, uninstalled

from bench.common import print_table, write_json
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import Served, served
from tests.fakes.model_folder import IM_END, ids_of, write_model_folder
from tests.fakes.mutants import BODIES, mutant, names_the_field

_WARM_UP = 0.2  # of the bodies, before memory is read the first time
_ALLOWED = {200, 400, 404, 413, 422}
_LONGEST_ERROR = 10_000


async def send_all(server: Served, num_bodies: int, core: FakeCore) -> dict[str, Any]:
    """Sends bodies to every endpoint in turn. Raises RuntimeError at the first answer that must not be."""
    dice = random.Random(0)
    paths = sorted(BODIES)
    statuses: Counter[int] = Counter()
    longest, before = 0, 0
    for i in range(num_bodies):
        path = paths[i % len(paths)]
        body = mutant(BODIES[path], dice)
        answer = await server.post(path, body)
        statuses[answer.status_code] += 1
        is_right = answer.status_code in _ALLOWED
        if answer.status_code >= 400:
            longest = max(longest, len(answer.content))
            is_right = is_right and longest < _LONGEST_ERROR and names_the_field(path, answer.json())
        if not is_right:
            raise RuntimeError(f"{path} with {body!r:.2000} → {answer.status_code} {answer.text[:500]}")
        core.requests.clear()  # it remembers what it was asked
        if i + 1 == int(num_bodies * _WARM_UP):
            before = psutil.Process().memory_info().rss
    after = psutil.Process().memory_info().rss
    return {
        "bodies": num_bodies,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "longest_error_bytes": longest,
        "rss_before_mib": before / 2**20,
        "rss_after_mib": after / 2**20,
        "rss_growth_percent": 100.0 * (after / before - 1.0),
    }


async def run(num_bodies: int, core: FakeCore) -> dict[str, Any]:
    """The same against a server that is made here."""
    async with served(core.endpoint) as server:
        return await send_all(server, num_bodies, core)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sends bodies that are almost right; checks answers and memory.")
    parser.add_argument("--bodies", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = write_model_folder(pathlib.Path(name) / "tiny")
        ids = [*ids_of("ab"), IM_END]
        with FakeCore(f"ipc://{name}/core", lambda *_: ids, model=str(folder), max_model_len=512) as core:
            result = asyncio.run(run(arguments.bodies, core))
    print_table(["figure", "value"], [[name, value] for name, value in result.items()])
    write_json("mutated_bodies", {"result": result})


if __name__ == "__main__":
    main()
