import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from folovllm.common.errors import ModelError, RequestError
from folovllm.frontend.chat_template import ChatTemplate
from folovllm.frontend.tokenizer import Tokenizer
from tests.fakes.tokenizers_ import CHATML_WITH_TOOLS, case_tokenizer

USER = {"role": "user", "content": "hi 你好 <b>"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wetter für <Stadt> & 天气",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def tool_call(arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def history(arguments: Any) -> list[dict[str, Any]]:
    return [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [tool_call(arguments)]},
        {"role": "tool", "content": "20 °C", "tool_call_id": "c1"},
    ]


CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "with system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, {"role": "assistant", "content": "Hello!\n"}, {"role": "user", "content": " and?  "}],
    "thinking": [USER, {"role": "assistant", "content": "<think>\nwell\n</think>\n\nHello"}, USER],
}
TOOL_CHATS: dict[str, list[dict[str, Any]]] = {
    "call": history({"city": "世界"}),
    "two answers": [*history({"city": "X"}), {"role": "tool", "content": "30 °C"}, USER],
}
OPTIONS: list[dict[str, Any]] = [{}, {"add_generation_prompt": False}]
QWEN3_OPTIONS: list[dict[str, Any]] = [*OPTIONS, {"enable_thinking": False}, {"enable_thinking": True}]


@pytest.fixture(scope="module", params=["built", "qwen3"])
def template(request: pytest.FixtureRequest) -> ChatTemplate:
    """A small template in Qwen3's manner, and Qwen3's own."""
    tokenizer = case_tokenizer() if request.param == "built" else request.getfixturevalue("qwen3_tokenizer")
    return ChatTemplate.from_tokenizer(tokenizer)


@pytest.fixture(scope="module")
def qwen3_oracle(qwen3_tokenizer_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(qwen3_tokenizer_dir)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS.keys())
def test_demo_equals_transformers(
    demo_tokenizer: Tokenizer, demo_model_dir: Path, chat: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    oracle = AutoTokenizer.from_pretrained(demo_model_dir)
    options = {"add_generation_prompt": True, **options}
    text = ChatTemplate.from_tokenizer(demo_tokenizer).render(chat, **options)
    assert text == oracle.apply_chat_template(chat, tokenize=False, **options)
    ids = oracle.apply_chat_template(chat, tokenize=True, return_dict=False, **options)
    assert demo_tokenizer.encode(text, add_special_tokens=False) == ids


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("options", QWEN3_OPTIONS)
@pytest.mark.parametrize("chat", (CHATS | TOOL_CHATS).values(), ids=(CHATS | TOOL_CHATS).keys())
def test_qwen3_equals_transformers(
    qwen3_tokenizer: Tokenizer,
    qwen3_oracle: Any,
    chat: list[dict[str, Any]],
    options: dict[str, Any],
    tools: list[dict[str, Any]] | None,
) -> None:
    options = {"add_generation_prompt": True, "tools": tools, **options}
    text = ChatTemplate.from_tokenizer(qwen3_tokenizer).render(chat, **options)
    filled = [{**message, "content": message["content"] or ""} for message in chat]
    assert text == qwen3_oracle.apply_chat_template(filled, tokenize=False, **options)
    ids = qwen3_oracle.apply_chat_template(filled, tokenize=True, return_dict=False, **options)
    assert qwen3_tokenizer.encode(text, add_special_tokens=False) == ids


@pytest.mark.parametrize("as_text", [True, False])
def test_L31_null_content_and_good_arguments(template: ChatTemplate, as_text: bool) -> None:
    arguments = {"city": "X 世"}
    text = template.render(history(json.dumps(arguments) if as_text else arguments), tools=TOOLS)
    assert json.dumps(arguments, ensure_ascii=False) in text
    assert "None" not in text


@pytest.mark.parametrize("arguments", ["[]", "42", '{"city":"Bei', '"text"', "null", [], 42, "[" * 100_000])
def test_L31_bad_arguments_are_refused_with_their_message(template: ChatTemplate, arguments: Any) -> None:
    with pytest.raises(RequestError, match=r"^messages\[1\]\.tool_calls\[0\]\.function\.arguments") as caught:
        template.render(history(arguments))
    assert caught.value.field == "messages[1].tool_calls[0].function.arguments"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("arguments", ["", None])
def test_L31_missing_arguments_are_none(template: ChatTemplate, arguments: Any) -> None:
    assert "{}" in template.render(history(arguments))


@pytest.mark.parametrize("role", ["user", "system", "tool", "assistant"])
def test_L32_parts_are_joined(template: ChatTemplate, role: str) -> None:
    parts = [{"type": "text", "text": "hi"}, {"type": "text", "text": "yo"}]
    joined = template.render([USER, {"role": role, "content": "hi\nyo"}])
    assert template.render([USER, {"role": role, "content": parts}]) == joined
    assert "hi\nyo" in joined


def test_L32_no_parts_are_an_empty_text(template: ChatTemplate) -> None:
    assert template.render([{"role": "user", "content": []}]) == template.render([{"role": "user", "content": ""}])


def test_L32_an_image_is_refused_by_its_type(template: ChatTemplate) -> None:
    parts = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(RequestError, match=r"messages\[1\]\.content\[1\] is of type 'image_url': .* text only"):
        template.render([SYSTEM, {"role": "user", "content": parts}])


@pytest.mark.parametrize(
    "content, message",
    [
        (5, "messages[0].content must be a string"),
        ({"type": "text"}, "messages[0].content must be a string"),
        ([5], "messages[0].content[0] must be a text part"),
        ([{"text": "no type"}], "messages[0].content[0] is of type 'None'"),
        ([{"type": "text"}], "messages[0].content[0].text must be a string"),
        ([{"type": "text", "text": ["x"]}], "messages[0].content[0].text must be a string"),
    ],
)
def test_L32_wrong_contents_are_refused(template: ChatTemplate, content: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        template.render([{"role": "user", "content": content}])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("content", ["OK! ", "OK!\n", "OK", "", "a  \n\n ", "say OK! "])
@pytest.mark.parametrize("options", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_L33_the_last_message_keeps_its_last_characters(
    template: ChatTemplate, content: str, options: dict[str, Any]
) -> None:
    chat = [{"role": "user", "content": "say OK! "}, {"role": "assistant", "content": content}]
    text = template.render(chat, add_generation_prompt=False, continue_final_message=True, **options)
    assert text.endswith(content)
    assert text.rpartition("<|im_start|>")[2].startswith("assistant\n")


@pytest.mark.parametrize("thinking", [True, False])
def test_L33_qwen3_puts_an_empty_think_block_before_it_in_both_modes(
    qwen3_tokenizer: Tokenizer, thinking: bool
) -> None:
    template = ChatTemplate.from_tokenizer(qwen3_tokenizer)
    chat = [USER, {"role": "assistant", "content": "OK! "}]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    text = template.render(chat, enable_thinking=thinking, **options)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nOK! ")


@pytest.mark.parametrize("content", ["OK! ", "OK!\n", "OK"])
@pytest.mark.parametrize("options", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_L33_continued_qwen3_equals_transformers(
    qwen3_tokenizer: Tokenizer, qwen3_oracle: Any, content: str, options: dict[str, Any]
) -> None:
    options = {"add_generation_prompt": False, "continue_final_message": True, **options}
    chat = [USER, {"role": "assistant", "content": content}]
    text = ChatTemplate.from_tokenizer(qwen3_tokenizer).render(chat, **options)
    assert text == qwen3_oracle.apply_chat_template(chat, tokenize=False, **options)


def test_L33_continue_and_generation_prompt_exclude_each_other(template: ChatTemplate) -> None:
    with pytest.raises(RequestError, match="add_generation_prompt=False") as caught:
        template.render([USER], add_generation_prompt=True, continue_final_message=True)
    assert caught.value.field == "continue_final_message"


def test_L33_a_message_with_tool_calls_cannot_be_continued(template: ChatTemplate) -> None:
    with pytest.raises(RequestError, match="tool calls and cannot be continued"):
        template.render(history({})[:2], add_generation_prompt=False, continue_final_message=True)


def test_continued_text_may_contain_the_mark_itself() -> None:
    template = ChatTemplate({"default": "{% for m in messages %}[{{ m.content }}]{% endfor %}"})
    chat = [{"role": "user", "content": "FoloVLLM-end-of-final-message+"}, {"role": "assistant", "content": "x "}]
    text = template.render(chat, add_generation_prompt=False, continue_final_message=True)
    assert text == "[FoloVLLM-end-of-final-message+][x "


def test_a_template_that_leaves_out_the_last_message_cannot_continue_it() -> None:
    template = ChatTemplate({"default": "{{ messages[0].content }}"})
    with pytest.raises(RequestError, match="leaves out the last message's content"):
        template.render([USER, USER], add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "messages is empty"),
        ("hi", "messages must be a list"),
        ({"role": "user", "content": "hi"}, "messages must be a list"),
        (["hi"], "messages[0] must be an object"),
        ([{"content": "hi"}], "messages[0].role must be a string"),
        ([USER, {"role": 5, "content": "hi"}], "messages[1].role must be a string"),
        ([{"role": "narrator", "content": "hi"}], "messages[0].role='narrator' is not known"),
        ([{"role": "", "content": "hi"}], "messages[0].role='' is not known"),
        ([{"role": "user", "content": "hi", "x": object()}], "messages[0].x must be a JSON value"),
        ([{"role": "assistant", "tool_calls": {"a": 1}}], "messages[0].tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": ["f"]}], "messages[0].tool_calls[0] must be an object"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "messages[0].tool_calls[0].function.name"),
    ],
)
def test_bad_messages_are_refused_with_their_place(template: ChatTemplate, messages: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        template.render(messages)
    assert str(caught.value).startswith(message)


def test_deep_nesting_is_refused(template: ChatTemplate) -> None:
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    with pytest.raises(RequestError, match="nested too deeply"):
        template.render([{**USER, "extra": deep}])


def test_messages_of_the_caller_stay_as_they_are(template: ChatTemplate) -> None:
    chat = history('{"city": "X"}')
    before = json.dumps(chat)
    template.render(chat)
    assert json.dumps(chat) == before


def test_developer_is_system_where_the_template_does_not_know_it(template: ChatTemplate) -> None:
    developer = {"role": "developer", "content": "Be brief."}
    assert template.render([developer, USER]) == template.render([SYSTEM, USER])
    knows = ChatTemplate({"default": "{% if messages[0].role == 'developer' %}dev{% endif %}"})
    assert knows.render([developer]) == "dev"


def test_a_role_of_the_templates_own_is_accepted() -> None:
    template = ChatTemplate({"default": "{% if messages[0].role == 'ipython' %}code{% endif %}"})
    assert template.render([{"role": "ipython", "content": ""}]) == "code"


def test_reasoning_is_given_under_the_name_that_templates_read() -> None:
    template = ChatTemplate({"default": "{{ messages[0].reasoning_content }}"})
    assert template.render([{"role": "assistant", "content": "", "reasoning": "why"}]) == "why"


def test_a_model_without_template_cannot_chat() -> None:
    with pytest.raises(RequestError, match="no chat template"):
        ChatTemplate({}).render([USER])


def test_a_broken_template_is_a_fault_of_the_model() -> None:
    with pytest.raises(ModelError, match=r"'default' is not valid Jinja2: .* \(line 2\)"):
        ChatTemplate({"default": "\n{% if %}"})


def test_tools_choose_their_own_template_where_there_is_one() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "{{ tools | length }} tools"})
    assert template.render([USER]) == "plain"
    assert template.render([USER], tools=TOOLS) == "1 tools"


@pytest.mark.parametrize("tools", ["x", [5], {"a": 1}])
def test_bad_tools_are_refused(template: ChatTemplate, tools: Any) -> None:
    with pytest.raises(RequestError, match="tools must be a list of objects") as caught:
        template.render([USER], tools=tools)
    assert caught.value.field == "tools"


def test_what_the_template_would_drop_in_silence_is_refused(demo_tokenizer: Tokenizer) -> None:
    template = ChatTemplate.from_tokenizer(demo_tokenizer)
    with pytest.raises(RequestError, match="knows no tools"):
        template.render([USER], tools=TOOLS)
    with pytest.raises(RequestError, match=r"messages\[1\]\.tool_calls: .* knows no tool calls"):
        template.render(history({}))
    with pytest.raises(RequestError, match="no variable enable_thinking; it knows add_generation_prompt, messages"):
        template.render([USER], enable_thinking=False)


def test_the_environment_templates_are_written_for() -> None:
    source = (
        "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}\n{% endfor %}\n"
        "{{ strftime_now('%d %b %Y') }} {{ bos_token }} {{ documents is none }} {{ {'b': 1} | tojson(indent=1) }}"
    )
    template = ChatTemplate({"default": source}, special_tokens={"bos_token": "<s>"}, now=lambda: datetime(2031, 5, 6))
    assert template.render([USER, USER]) == '"hi 你好 <b>"06 May 2031 <s> True {\n "b": 1\n}'


@pytest.mark.parametrize(
    "source, message",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 5 }}", "str"),
        ("{{ messages[7].content.x }}", "no element 7"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_what_goes_wrong_inside_a_template_is_the_requests_error(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        ChatTemplate({"default": source}).render([USER])
    assert caught.value.field == "messages"


def test_the_built_template_is_the_one_these_tests_mean() -> None:
    assert case_tokenizer().chat_template == CHATML_WITH_TOOLS
