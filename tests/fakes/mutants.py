"""Bodies that are almost right: those of every endpoint, and how they are spoilt."""

import copy
import random
from typing import Any

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
BODIES: dict[str, dict[str, Any]] = {
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


def names_the_field(path: str, answer: dict[str, Any]) -> bool:
    """Whether a refusal says what is wrong: in `param`, or in the message where the form has none (Anthropic's)."""
    error = answer["error"]
    is_no_object = "Expected `object`" in error["message"] and " - at " not in error["message"]
    return bool(error["message"]) and (path == "/v1/messages" or is_no_object or bool(error["param"]))
