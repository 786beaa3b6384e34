"""Bodies that are almost right: each is answered, or refused in few words; none is an internal error."""

import json
import random
from collections.abc import Callable

import pytest

from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import Served, run
from tests.fakes.mutants import BODIES, mutant, names_the_field

_NUM_MUTANTS = 400


@pytest.mark.parametrize("path", BODIES)
def test_L26_no_body_is_an_internal_error(saying: Callable[[str], FakeCore], path: str) -> None:
    dice = random.Random(path)

    async def scenario(server: Served) -> None:
        assert (await server.post(path, BODIES[path])).status_code == 200
        statuses = set()
        for _ in range(_NUM_MUTANTS):
            body = mutant(BODIES[path], dice)
            answer = await server.post(path, body)
            statuses.add(answer.status_code)
            assert answer.status_code in {200, 400, 404}, f"{json.dumps(body)[:2000]} → {answer.text[:500]}"
            if answer.status_code != 200:
                assert len(answer.content) < 10_000
                assert names_the_field(path, answer.json()), f"{json.dumps(body)[:2000]} → {answer.text}"
        assert statuses >= {200, 400}
        assert server.context.num_active == 0

    run(saying("ab").endpoint, scenario)


@pytest.mark.parametrize("path", BODIES)
def test_L26_no_broken_bytes_are_an_internal_error(saying: Callable[[str], FakeCore], path: str) -> None:
    dice = random.Random(path)
    whole = json.dumps(BODIES[path]).encode()

    async def scenario(server: Served) -> None:
        for _ in range(_NUM_MUTANTS // 4):
            data = bytearray(whole[: dice.randint(0, len(whole))])
            for _ in range(dice.randint(0, 3)):
                data.insert(dice.randint(0, len(data)), dice.randint(0, 255))
            answer = await server.http.post(path, content=bytes(data))
            assert answer.status_code in {200, 400, 404}, f"{bytes(data)!r} → {answer.text[:500]}"

    run(saying("ab").endpoint, scenario)
