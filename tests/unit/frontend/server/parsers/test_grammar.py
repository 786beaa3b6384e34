"""Grammars of calls: what they let through is what the parsers find."""

import json
from typing import Any

import llguidance
import pytest

from folovllm.frontend.server.parsers.base import AnswerContext, ToolFormat
from folovllm.frontend.server.parsers.hermes import HERMES
from folovllm.frontend.server.parsers.llama3_json import LLAMA3_JSON
from folovllm.frontend.server.protocol.tools import FunctionDefinition, NamedFunction, NamedToolChoice, Tool, ToolChoice
from tests.fakes.tokenizers_ import case_tokenizer

SCHEMA = {"properties": {"a": {"$ref": "#/$defs/word"}}, "required": ["a"], "$defs": {"word": {"type": "string"}}}
TOOLS = [
    Tool(function=FunctionDefinition(name="say", parameters=SCHEMA)),
    Tool(function=FunctionDefinition(name='wait "now"')),
]
SAY = NamedToolChoice(function=NamedFunction(name="say"))


def accepts(format_: ToolFormat, text: str, choice: ToolChoice = "required", parallel: bool = True) -> bool:
    """Whether the grammar lets the text through, to its end."""
    assert format_.constraint is not None
    given = format_.constraint(TOOLS, choice, parallel)
    assert list(given) == ["grammar"]
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(given["grammar"]))
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()


def hermes(name: str, arguments: Any) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def llama(name: str, arguments: Any) -> str:
    return f'{{"name": {json.dumps(name)}, "parameters": {json.dumps(arguments)}}}'


@pytest.mark.parametrize("format_, written, between", [(HERMES, hermes, "\n"), (LLAMA3_JSON, llama, "; ")])
def test_calls_of_the_tools_and_nothing_else(format_: ToolFormat, written: Any, between: str) -> None:
    say, wait = written("say", {"a": "x{"}), written('wait "now"', {})
    assert accepts(format_, say)
    assert accepts(format_, wait)
    assert accepts(format_, between.join([say, wait, say]))
    assert not accepts(format_, between.join([say, wait]), parallel=False)
    assert not accepts(format_, "hello")
    assert not accepts(format_, written("other", {}))
    assert not accepts(format_, written("say", {"a": 1}))
    assert not accepts(format_, written("say", {}))
    assert not accepts(format_, written('wait "now"', {"a": "x"}))


def test_one_function_alone() -> None:
    assert accepts(HERMES, hermes("say", {"a": "x"}), SAY)
    assert not accepts(HERMES, hermes('wait "now"', {}), SAY)


@pytest.mark.parametrize("format_, written", [(HERMES, hermes), (LLAMA3_JSON, llama)])
def test_the_parser_finds_what_the_grammar_lets_through(format_: ToolFormat, written: Any) -> None:
    found = format_.make(AnswerContext(case_tokenizer(), "")).parse(written('wait "now"', {}))
    assert [(call.name, call.arguments, call.done) for call in found.calls] == [('wait "now"', "{}", True)]
    assert found.content == ""
