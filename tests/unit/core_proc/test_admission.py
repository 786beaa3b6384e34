"""What is refused at the door, with which field and figures, and what is let in unchanged."""

import numpy as np
import pytest

from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.messages.frontend_core import EngineCoreRequest, RejectedRequest
from folovllm.core_proc.admission import Admission, FinishPace
from folovllm.core_proc.request import Request

VOCABULARY = 100


def make_admission(**options: int | None) -> Admission:
    figures: dict[str, int | None] = {
        "max_model_len": 64,
        "num_valid_token_ids": VOCABULARY,
        "num_pool_tokens": 48,
        "max_num_seqs": 2,
        "max_num_queued_reqs": 4,
        "max_num_queued_tokens": None,
        **options,
    }
    return Admission(**figures)  # type: ignore[arg-type]


def make_message(prompt: list[int] | bytes, **fields: object) -> EngineCoreRequest:
    token_ids = prompt if isinstance(prompt, bytes) else np.array(prompt, "<i4").tobytes()
    values: dict[str, object] = {"number": 1, "request_id": "r", "sampling": SamplingRow(), "max_tokens": 5, **fields}
    return EngineCoreRequest(prompt_token_ids=token_ids, **values)  # type: ignore[arg-type]


def refusal(
    admission: Admission,
    message: EngineCoreRequest,
    live: dict[int, Request] | None = None,
    running: int = 0,
    waiting: int = 0,
    waiting_tokens: int = 0,
) -> RejectedRequest | None:
    return admission.refusal(
        message, live or {}, num_running=running, num_waiting=waiting, num_waiting_tokens=waiting_tokens
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        (b"\x01\x00\x00", "3 bytes are no whole number"),
        ([5, -1, 3], "token id -1 at position 1 must lie between 0 and 99"),
        ([5, 3, 100], "token id 100 at position 2 must lie between 0 and 99"),
        ([2**31 - 1], "token id 2147483647 at position 0"),
        ([1] * 64, "the prompt has 64 tokens and the model's length (max_model_len) is 64"),
        ([1] * 1000, "the prompt has 1000 tokens and the model's length (max_model_len) is 64"),
        ([1] * 49, "the prompt has 49 tokens and the whole KV pool holds 48"),
    ],
)
def test_L12_L17_L20_prompts_that_can_never_run(prompt: list[int] | bytes, message: str) -> None:
    rejected = refusal(make_admission(), make_message(prompt))
    assert rejected is not None
    assert (rejected.number, rejected.kind, rejected.field) == (1, "invalid", "prompt_token_ids")
    assert message in rejected.message


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [float("nan"), float("inf"), -0.1]),
        ("top_k", [-1, 2**31]),
        ("top_p", [0.0, -1.0, 1.01, float("nan")]),
        ("min_p", [-0.1, 2.0, float("nan")]),
        ("seed", [2**63]),
        ("sample_index", [1, -1]),
        ("min_tokens", [-1, 2**31, 2**64 - 1]),  # past the worker's bound, which fails a whole step; past int64
        ("stop_token_ids", [b"abc", np.array([-1], "<i4").tobytes(), np.array([VOCABULARY], "<i4").tobytes()]),
        ("stop_token_ids", [np.zeros(1025, "<i4").tobytes()]),
    ],
)
def test_L10_sampling_values_out_of_range(field: str, values: list[object]) -> None:
    for value in values:
        sampling = SamplingRow(**{field: value})  # type: ignore[arg-type]
        rejected = refusal(make_admission(), make_message([1], sampling=sampling))
        assert rejected is not None, value
        assert (rejected.kind, rejected.field) == ("invalid", field)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingRow(),
        SamplingRow(temperature=5e-324),
        SamplingRow(temperature=1e300, top_k=2**31 - 1, top_p=1e-9, min_p=1.0, seed=-(2**63)),
        SamplingRow(min_tokens=2**31 - 1, stop_token_ids=np.arange(VOCABULARY, dtype="<i4").tobytes()),
    ],
)
def test_L10_extreme_values_in_range_are_let_in(sampling: SamplingRow) -> None:
    assert refusal(make_admission(), make_message([1], sampling=sampling)) is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 7}, "n"),  # more than run and wait at once
        ({"max_tokens": -1}, "max_tokens"),
        ({"number": -1}, "number"),
        ({"number": 2**31}, "number"),
        ({"number": 2**31 - 2, "n": 3}, "number"),
    ],
)
def test_numbers_out_of_range(fields: dict[str, object], field: str) -> None:
    rejected = refusal(make_admission(), make_message([1], **fields))
    assert rejected is not None
    assert (rejected.kind, rejected.field) == ("invalid", field)


def test_L23_a_number_in_use_is_refused_with_any_of_its_answers() -> None:
    admission = make_admission()
    (live,) = admission.admit(make_message([1], number=7), 0, 0.0)
    for number, n, is_refused in ((7, 1, True), (5, 3, True), (5, 2, False), (8, 1, False)):
        rejected = refusal(admission, make_message([1], number=number, n=n), {7: live})
        assert (rejected is not None) is is_refused
        assert rejected is None or "number 7 is in use" in rejected.message


def test_admit_gives_the_leader_first_and_numbers_in_order() -> None:
    sampling = SamplingRow(temperature=0.5, seed=9)
    message = make_message([1, 2, 3], number=10, n=3, sampling=sampling, priority=-2, stream=True)
    requests = make_admission().admit(message, client=4, now_s=1.5)
    assert [request.number for request in requests] == [10, 11, 12]
    assert [request.sampling.sample_index for request in requests] == [0, 1, 2]
    assert [request.parent for request in requests] == [None, requests[0], requests[0]]
    for request in requests:
        assert request.prompt_token_ids.tolist() == [1, 2, 3]
        assert (request.client, request.priority, request.stream, request.arrival_s) == (4, -2, True, 1.5)
        assert (request.sampling.seed, request.max_tokens) == (9, 5)


@pytest.mark.parametrize(("pool", "max_tokens"), [(48, 39), (1000, 54)])
def test_L20_max_tokens_is_cut_to_the_room_there_is(pool: int, max_tokens: int) -> None:
    (request,) = make_admission(num_pool_tokens=pool).admit(make_message([1] * 10, max_tokens=10**9), 0, 0.0)
    assert request.max_tokens == max_tokens


@pytest.mark.parametrize(
    ("running", "waiting", "n", "is_full"),
    [
        (0, 0, 6, False),  # two run, four wait
        (0, 1, 6, True),
        (2, 3, 1, False),
        (2, 4, 1, True),
        (1, 4, 1, False),  # a slot is free: one of those who wait is as good as running
        (2, 3, 2, True),
    ],
)
def test_the_queue_is_bounded_in_requests(running: int, waiting: int, n: int, is_full: bool) -> None:
    rejected = refusal(make_admission(), make_message([1], n=n), running=running, waiting=waiting)
    assert (rejected is not None) is is_full
    if rejected is not None:
        assert (rejected.kind, rejected.field) == ("queue_full", "")
        assert "bounded at 4" in rejected.message
        assert rejected.retry_after_s >= 1


@pytest.mark.parametrize(
    ("running", "waiting", "waiting_tokens", "is_full"),
    [
        (2, 0, 0, False),  # 30 tokens, more than the bound, but nobody else waits
        (2, 1, 5, True),
        (1, 0, 0, False),
        (0, 1, 5, False),  # it can run at once
    ],
)
def test_the_queue_is_bounded_in_tokens(running: int, waiting: int, waiting_tokens: int, is_full: bool) -> None:
    admission = make_admission(max_num_queued_tokens=25)
    rejected = refusal(
        admission, make_message([1] * 30), running=running, waiting=waiting, waiting_tokens=waiting_tokens
    )
    assert (rejected is not None) is is_full


def test_the_pace_of_ends_estimates_when_to_try_again() -> None:
    pace = FinishPace()
    assert pace.seconds_until(3) == 1.0
    for second in range(0, 400, 4):
        pace.note(2, float(second))
    assert pace.seconds_until(1) == pytest.approx(2.0)
    assert pace.seconds_until(5) == pytest.approx(10.0)
    assert pace.seconds_until(1000) == 60.0
