"""Bodies that are almost right: each is answered, or refused in few words; none is an internal error."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import Served, run

_NUM_MUTANTS = 400
_HELLO = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
_SAMPLING: dict[str, Any] = {
    "n": 1,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 4,
    "seed": 3,
    "stop": ["x"],
    "logit_bias": {"65": 1.0},
    "max_tokens": 2,
    "stream": False,
    "priority": 1,
    "timeout_s": 5.0,
    "structured_outputs": {"choice": ["a", "b"]},
}
_BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _SAMPLING | {"messages": _HELLO, "tools": [_TOOL], "tool_choice": "none", "logprobs": True},
    "/v1/completions": _SAMPLING | {"prompt": ["abc", [65, 66]], "logprobs": 1, "echo": True},
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
        ],
        "max_output_tokens": 2,
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        "tool_choice": "none",
    },
    "/v1/messages": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "1"}]},
        ],
        "max_tokens": 2,
        "system": [{"type": "text", "text": "s"}],
        "stop_sequences": ["x"],
    },
    "/tokenize": {"messages": _HELLO, "add_generation_prompt": True},
    "/detokenize": {"tokens": [65, 66]},
}
_STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, -0.5, 1e308, "", "x", "0.5", "\x00", "😀", "x" * 5000),
    *([], [[]], [None], [1, "a"], {}, {"a": {}}, {"type": "text"}, [{}], ["x"] * 300),
)


def mutant(body: dict[str, Any], dice: random.Random) -> Any:
    """A copy in which one to three places are replaced, taken out, doubled or renamed."""
    made: Any = copy.deepcopy(body)
    for _ in range(dice.randint(1, 3)):
        holder: Any = made
        for _ in range(dice.randint(0, 4)):
            inner = [value for value in (holder.values() if isinstance(holder, dict) else holder) if value]
            inner = [value for value in inner if isinstance(value, dict | list)]
            if inner:
                holder = dice.choice(inner)
        places = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not places:
            continue
        place = dice.choice(places)
        action = dice.choice(("replace", "replace", "remove", "double", "rename"))
        if action == "replace":
            holder[place] = copy.deepcopy(dice.choice(_STRANGE))
        elif action == "remove":
            del holder[place]
        elif isinstance(holder, dict):
            holder[f"{place}2"] = holder.pop(place) if action == "rename" else copy.deepcopy(holder[place])
        else:
            holder.append(copy.deepcopy(holder[place]))
    return made


@pytest.mark.parametrize("path", _BODIES)
def test_L26_no_body_is_an_internal_error(saying: Callable[[str], FakeCore], path: str) -> None:
    dice = random.Random(path)

    async def scenario(server: Served) -> None:
        assert (await server.post(path, _BODIES[path])).status_code == 200
        statuses = set()
        for _ in range(_NUM_MUTANTS):
            body = mutant(_BODIES[path], dice)
            answer = await server.post(path, body)
            statuses.add(answer.status_code)
            assert answer.status_code in {200, 400, 404}, f"{json.dumps(body)[:2000]} → {answer.text[:500]}"
            if answer.status_code != 200:
                assert len(answer.content) < 10_000
                assert answer.json()["error"]["message"]
        assert statuses >= {200, 400}
        assert server.context.num_active == 0

    run(saying("ab").endpoint, scenario)


@pytest.mark.parametrize("path", _BODIES)
def test_L26_no_broken_bytes_are_an_internal_error(saying: Callable[[str], FakeCore], path: str) -> None:
    dice = random.Random(path)
    whole = json.dumps(_BODIES[path]).encode()

    async def scenario(server: Served) -> None:
        for _ in range(_NUM_MUTANTS // 4):
            data = bytearray(whole[: dice.randint(0, len(whole))])
            for _ in range(dice.randint(0, 3)):
                data.insert(dice.randint(0, len(data)), dice.randint(0, 255))
            answer = await server.http.post(path, content=bytes(data))
            assert answer.status_code in {200, 400, 404}, f"{bytes(data)!r} → {answer.text[:500]}"

    run(saying("ab").endpoint, scenario)
