import pytest

from folovllm.frontend.outputs import CompletionOutput, RequestOutput
from folovllm.frontend.progress import Bar, Progress


def output(num_in: int, *nums_out: int) -> RequestOutput:
    answers = [CompletionOutput(i, "", list(range(count))) for i, count in enumerate(nums_out)]
    return RequestOutput("0", None, list(range(num_in)), outputs=answers)


def test_the_bar_shows_input_and_output_tokens_per_second(capsys: pytest.CaptureFixture[str]) -> None:
    now = 10.0
    with Progress(2, True, clock=lambda: now) as progress:
        now = 12.0
        progress.update(output(4, 3, 3))
        progress.update(output(2, 4))
        assert progress.rates() == "input 3.0 tokens/s, output 5.0 tokens/s"
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "input 3.0 tokens/s, output 5.0 tokens/s" in shown


def test_a_bar_that_is_off_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, False) as progress:
        progress.update(output(4, 3))
    assert capsys.readouterr().err == ""


def test_a_plain_bar_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(3, shown=True, unit="request") as bar:
        bar.advance()
        bar.advance()
    assert "2/3" in capsys.readouterr().err
    with Bar(None, shown=False, unit="request") as off:
        off.advance()
    assert capsys.readouterr().err == ""
