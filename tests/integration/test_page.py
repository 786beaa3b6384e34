"""The page in a real browser: a server process over a core that follows a script, and headless Chromium."""

import json
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from folovllm.common.messages.frontend_core import EngineCoreRequest
from folovllm.frontend import int32
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.model_folder import CHAT_TEMPLATE, IM_END, ids_of, write_model_folder
from tests.integration.serving import ServeProcess

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEY = "key-1"
MARKED = "<think>\nA plan.\n</think>\n\nSee **this**:\n```python\nprint(1)\n```\n<script>x</script>"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
TOOLS = '[{"type": "function", "function": {"name": "weather"}}]'

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser: `apt-get install chromium` brings one")


def script(request: EngineCoreRequest, _index: int) -> list[int]:
    """Goes on and on, calls a tool, writes all kinds of text, or tells how often it was asked."""
    prompt = bytes(i for i in int32.unpack(request.prompt_token_ids) if i < 256).decode()
    last = prompt.rsplit("user\n", 1)[1]
    if "endless" in last:
        return ids_of("on and ") * 20_000
    if "weather" in last and "sunny" not in last:
        return [*ids_of(CALL), IM_END]
    return [*ids_of(MARKED if "marked" in last else f"Answer {prompt.count('assistant')}."), IM_END]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = write_model_folder(tmp_path_factory.mktemp("page") / "tiny")
    calls = "{{ message.content }}{% for call in message.tool_calls or [] %}{{ call }}{% endfor %}"
    template = CHAT_TEMPLATE.replace("{{ message.content }}", calls) + "{{ '' if tools }}{# <tool_call> </think> #}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": template}))
    with FakeCore(f"ipc://{folder.parent}/core", script, model=str(folder), max_model_len=200_000) as core:
        server = ServeProcess(["--engine", core.endpoint], env={"FOLOVLLM_API_KEYS": KEY})
        try:
            yield server.wait_ready().url
        finally:
            server.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The page with the key given; an error in a script fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(url)
    opened.fill("#key", "wrong")
    opened.click("#key-form button")
    expect(opened.locator("#key-note")).to_have_text("This key does not fit.")
    opened.fill("#key", KEY)
    opened.click("#key-form button")
    expect(opened.locator("#key-form")).to_be_hidden()
    expect(opened.locator("#model")).to_have_text("tiny")
    yield opened
    assert errors == []
    context.close()


def ask(page: Page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def done(page: Page) -> Locator:
    """The last answer, once it is whole."""
    expect(page.locator("#send")).to_be_visible()
    return page.locator("article.assistant").last


def test_a_chat_is_streamed_again_and_kept(page: Page) -> None:
    ask(page, "hello")
    expect(done(page)).to_contain_text("Answer 1.")
    expect(done(page).locator("footer")).to_contain_text("tokens")
    ask(page, "and now?")
    expect(done(page)).to_contain_text("Answer 2.")
    page.get_by_role("button", name="Regenerate").click()
    expect(done(page)).to_contain_text("Answer 2.")
    expect(page.locator("article")).to_have_count(4)
    page.keyboard.press("Alt+n")
    expect(page.locator("article")).to_have_count(0)
    ask(page, "another one")
    expect(done(page)).to_contain_text("Answer 1.")
    page.reload()
    titles = page.locator("#conversations .title")
    expect(titles).to_have_text(["another one", "hello"])
    titles.last.click()
    expect(page.locator("article")).to_have_count(4)
    page.get_by_role("button", name="Delete hello").click()
    expect(titles).to_have_text(["another one"])


def test_an_answer_can_be_stopped(page: Page) -> None:
    ask(page, "endless")
    expect(page.locator("article.assistant")).to_contain_text("on and on")
    page.keyboard.press("Escape")
    expect(done(page).locator("footer")).to_contain_text("stopped")


def test_thoughts_are_folded_and_text_is_never_html(page: Page) -> None:
    ask(page, "marked")
    answer = done(page)
    thoughts = answer.locator("details")
    expect(thoughts.locator("div")).to_be_hidden()
    thoughts.locator("summary").click()
    expect(thoughts.locator("div")).to_have_text("A plan.")
    expect(answer.locator("strong")).to_have_text("this")
    expect(answer.locator("pre")).to_have_text("print(1)")
    expect(answer.locator("figcaption")).to_contain_text("python")
    expect(answer).to_contain_text("<script>x</script>")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer.get_by_role("button", name="Copy code").click()
    expect(answer.locator(".copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "print(1)"


def test_a_tool_call_is_shown_and_answered(page: Page) -> None:
    page.fill("#tools", "[oops")
    ask(page, "weather?")
    expect(page.locator("#tools-note")).to_contain_text("Tools:")
    expect(page.locator("article")).to_have_count(0)
    page.fill("#tools", TOOLS)
    page.press("#input", "Enter")
    call = done(page).locator(".call")
    expect(call.locator("header")).to_contain_text("weather")
    expect(call.locator("pre")).to_contain_text('"city": "Bonn"')
    call.locator("input").fill("sunny")
    call.locator("input").press("Enter")
    expect(page.locator("article.tool")).to_contain_text("sunny")
    expect(done(page)).to_contain_text("Answer")


def test_settings_are_sent_and_kept(page: Page) -> None:
    page.fill("#system", "Be brief.")
    page.fill("#max_tokens", "3")
    page.fill("#temperature", "0.5")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "hello")
    body = sent.value.post_data_json
    assert body is not None
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["max_tokens"], body["temperature"]) == (3, 0.5)
    assert "top_p" not in body
    expect(done(page).locator("footer")).to_contain_text("cut at its limit")
    page.reload()
    expect(page.locator("#max_tokens")).to_have_value("3")
    page.click("#reset")
    expect(page.locator("#max_tokens")).to_have_value("")


def test_the_inspector_shows_the_engine(page: Page) -> None:
    ask(page, "endless")
    expect(page.locator("article.assistant")).to_contain_text("on and on")
    page.get_by_role("tab", name="Inspector").click()
    expect(page.locator('[data-figure="Running"]')).to_have_text("1")
    expect(page.locator("#blocks-note")).to_contain_text("100 blocks of 16 tokens")
    painted = """id => {
        const image = document.getElementById(id).getContext("2d").getImageData(0, 0, 60, 10);
        return new Set(new Uint32Array(image.data.buffer)).size;
    }"""
    assert page.evaluate(painted, "blocks") >= 4  # the fake core's blocks are of all four kinds
    page.get_by_role("tab", name="Chat").click()
    page.keyboard.press("Escape")


def test_light_and_dark(page: Page) -> None:
    assert page.locator("html").get_attribute("data-theme") == "light"
    page.click("#theme")
    page.reload()
    assert page.locator("html").get_attribute("data-theme") == "dark"


def test_an_error_is_told(page: Page) -> None:
    page.fill("#top_k", "-5")
    ask(page, "hello")
    expect(page.locator("article.assistant .error")).to_contain_text("top_k=-5")
