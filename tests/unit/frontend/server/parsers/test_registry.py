"""Which format a model needs."""

import pytest

from folovllm.common.errors import ConfigError
from folovllm.frontend.server.parsers.hermes import HERMES
from folovllm.frontend.server.parsers.llama3_json import LLAMA3_JSON
from folovllm.frontend.server.parsers.registry import choose_reasoning_format, choose_tool_format
from folovllm.frontend.server.parsers.think import THINK

QWEN3 = (
    "{%- if tools %}<tool_call>\n{\"name\": <function-name>}</tool_call>{% endif %}{{ '<think>\\n\\n</think>\\n\\n' }}"
)
LLAMA = '{"name": function name, "parameters": dictionary of argument name and its value}'


@pytest.mark.parametrize(
    "template, tools, reasoning",
    [
        (QWEN3, HERMES, THINK),
        (QWEN3.replace("think", "thought"), HERMES, None),
        (LLAMA, LLAMA3_JSON, None),
        ("<tool_call>\n<function=f>", None, None),
        ("{{ messages }}", None, None),
        (None, None, None),
    ],
)
def test_auto_looks_into_the_chat_template(template: str | None, tools: object, reasoning: object) -> None:
    assert choose_tool_format("auto", template) is tools
    assert choose_reasoning_format("auto", template) is reasoning


def test_names() -> None:
    assert choose_tool_format("hermes", None) is HERMES
    assert choose_tool_format("none", QWEN3) is None
    assert choose_reasoning_format("think", None) is THINK
    with pytest.raises(
        ConfigError, match=r"tool_parser='x' is not known; choose one of auto, none, hermes, llama3_json"
    ):
        choose_tool_format("x", None)
    with pytest.raises(ConfigError, match="reasoning_parser='x'"):
        choose_reasoning_format("x", None)
