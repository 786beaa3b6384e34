"""The fit finds the coefficients of machines that follow its model, nearly, and is careful where it knows nothing."""

import random
from collections.abc import Callable

import pytest

from folovllm.core_proc.step_time import StepLoad, StepTimeModel

Machine = Callable[[StepLoad], float]


def cpu(load: StepLoad) -> float:
    """About what two cores take for a model of 135 million parameters."""
    return (
        0.014
        + 0.0006 * load.num_decodes
        + 6e-7 * load.num_context
        + 0.00065 * load.num_prefill
        + 1.2e-7 * load.num_pairs
    )


def gpu(load: StepLoad) -> float:
    return (
        0.0008
        + 0.000012 * load.num_decodes
        + 2e-8 * load.num_context
        + 2.5e-6 * load.num_prefill
        + 1e-10 * load.num_pairs
    )


def run(
    model: StepTimeModel, machine: Machine, target_s: float, *, prompt: int, noise: float = 0.0, decodes: int = 8
) -> list[float]:
    """Steps' times while a prompt is computed beside decodes, chunk by chunk as the model says; two are in flight."""
    random_ = random.Random(1)
    times: list[float] = []
    computed, context = 0, decodes * 100
    in_flight: list[tuple[StepLoad, float]] = []
    while computed < prompt or in_flight:
        if computed < prompt:
            load = StepLoad(decodes, context)
            chunk = max(16, model.max_prefill_tokens(load, computed, target_s, min(2048, prompt - computed)))
            load = load.with_chunk(min(chunk, prompt - computed), computed)
            in_flight.append((load, model.predict(load)))
            computed += chunk
            context += decodes
        if len(in_flight) == 2 or computed >= prompt:
            load, expected_s = in_flight.pop(0)
            times.append(machine(load) * (1 + random_.uniform(-noise, noise)))
            model.observe(load, times[-1], expected_s)
    return times


def after_decoding(machine: Machine, num_steps: int = 60, decodes: int = 8) -> StepTimeModel:
    model = StepTimeModel()
    for step in range(num_steps):
        load = StepLoad(decodes, decodes * (40 + step))
        model.observe(load, machine(load))
    return model


@pytest.mark.parametrize("machine", [cpu, gpu])
def test_a_machine_that_follows_the_model_is_predicted(machine: Machine) -> None:
    random_ = random.Random(0)
    model = StepTimeModel()
    for _ in range(200):
        decodes = random_.randrange(64)
        load = StepLoad(decodes, decodes * random_.randrange(1, 500))
        if random_.random() < 0.5:
            load = load.with_chunk(random_.randrange(1, 1024), random_.randrange(4000))
        model.observe(load, machine(load))
    for load in (StepLoad(8, 2000), StepLoad(32, 9000).with_chunk(300, 1000), StepLoad(1, 10).with_chunk(64, 0)):
        assert model.predict(load) == pytest.approx(machine(load), rel=0.05)


@pytest.mark.parametrize(("machine", "target_s"), [(cpu, 0.06), (cpu, 0.12), (cpu, 0.25), (gpu, 0.002), (gpu, 0.004)])
@pytest.mark.parametrize("noise", [0.0, 0.08])
def test_the_target_is_kept_and_used(machine: Machine, target_s: float, noise: float) -> None:
    model = after_decoding(machine)
    run(model, machine, target_s, prompt=4000, noise=noise)
    times = run(model, machine, target_s, prompt=4000, noise=noise)
    assert max(times) <= target_s * (1.0 + 2 * noise)
    whole = times[:-1]  # the last chunk is what is left
    assert sum(whole) / len(whole) >= 0.8 * target_s


@pytest.mark.parametrize("machine", [cpu, gpu])
def test_the_first_prompt_ever_does_not_break_the_target(machine: Machine) -> None:
    target_s = 4 * machine(StepLoad(8, 800))
    model = after_decoding(machine)
    times = run(model, machine, target_s, prompt=8000)
    assert max(times) <= 1.1 * target_s
    assert sum(times[10:-1]) / len(times[10:-1]) >= 0.8 * target_s


def test_without_any_experience_the_first_chunk_is_small() -> None:
    assert StepTimeModel().max_prefill_tokens(StepLoad(4, 100), 0, 0.05, 2048) == 32
    assert StepTimeModel().max_prefill_tokens(StepLoad(4, 100), 0, 0.05, 7) == 7
    assert StepTimeModel().predict(StepLoad(4, 100)) == 0.0


def test_prompts_that_were_computed_alone_say_what_a_token_costs() -> None:
    model = after_decoding(cpu)
    model.observe(StepLoad(0, 0).with_chunk(512, 0), cpu(StepLoad(0, 0).with_chunk(512, 0)))
    assert model.max_prefill_tokens(StepLoad(8, 800), 0, 0.03, 2048) < 32


def test_a_chunk_grows_to_at_most_twice_what_was_tried() -> None:
    model = after_decoding(cpu)
    for size in (32, 64, 128):
        assert model.max_prefill_tokens(StepLoad(8, 800), 0, 10.0, 2048) == size
        load = StepLoad(8, 800).with_chunk(size, 0)
        model.observe(load, cpu(load))


def test_a_target_that_decodes_alone_exceed_leaves_no_token() -> None:
    model = after_decoding(cpu)
    run(model, cpu, 0.06, prompt=1000)
    assert model.max_prefill_tokens(StepLoad(8, 800), 0, 0.001, 2048) == 0


def test_longer_contexts_leave_less_room() -> None:
    model = after_decoding(cpu)
    for _ in range(4):
        run(model, cpu, 0.12, prompt=4000)
    near, far = (model.max_prefill_tokens(StepLoad(8, 800), computed, 0.12, 2048) for computed in (0, 6000))
    assert far < 0.7 * near


def test_a_pause_of_the_machine_is_left_out_of_the_fit() -> None:
    model = after_decoding(cpu)
    run(model, cpu, 0.12, prompt=4000)
    load = StepLoad(8, 800).with_chunk(100, 0)
    expected = model.predict(load)
    model.observe(load, 5.0)
    model.observe(load, cpu(load))
    assert model.predict(load) == pytest.approx(expected, rel=0.02)


def test_after_one_slow_step_the_next_is_planned_smaller_and_after_a_usual_one_as_before() -> None:
    model = after_decoding(cpu)
    run(model, cpu, 0.12, prompt=4000)
    load, mixed = StepLoad(8, 800), StepLoad(8, 800).with_chunk(90, 1000)
    usual = model.max_prefill_tokens(load, 1000, 0.12, 2048)
    model.observe(mixed, 1.5 * cpu(mixed))
    assert model.max_prefill_tokens(load, 1000, 0.12, 2048) < 0.75 * usual
    model.observe(mixed, cpu(mixed))
    assert model.max_prefill_tokens(load, 1000, 0.12, 2048) == pytest.approx(usual, rel=0.05)
    model.observe(mixed, 0.6 * cpu(mixed))  # one fast step is no reason to plan a larger one
    assert model.max_prefill_tokens(load, 1000, 0.12, 2048) == pytest.approx(usual, rel=0.05)


def test_a_machine_that_becomes_slower_is_followed() -> None:
    def slower(load: StepLoad) -> float:
        return 2 * cpu(load)

    model = after_decoding(cpu)
    run(model, cpu, 0.12, prompt=4000)
    for _ in range(4):
        for step in range(60):
            model.observe(StepLoad(8, 320 + 8 * step), slower(StepLoad(8, 320 + 8 * step)))
        run(model, slower, 0.12, prompt=4000)
    assert max(run(model, slower, 0.12, prompt=4000)) <= 1.1 * 0.12


def test_thousands_of_decode_steps_do_not_wash_out_what_prompts_cost() -> None:
    model = after_decoding(cpu)
    run(model, cpu, 0.12, prompt=4000)
    before = model.max_prefill_tokens(StepLoad(8, 3000), 0, 0.12, 2048)
    for step in range(5000):
        load = StepLoad(8, 320 + step % 3000)
        model.observe(load, cpu(load))
    assert model.max_prefill_tokens(StepLoad(8, 3000), 0, 0.12, 2048) == pytest.approx(before, rel=0.1)


def test_a_step_without_a_time_is_no_sample() -> None:
    model = StepTimeModel()
    model.observe(StepLoad(1, 10), 0.0)
    model.observe(StepLoad(1, 10), -1.0)
    assert model.predict(StepLoad(1, 10)) == 0.0


def test_a_chunk_reads_its_context_too() -> None:
    load = StepLoad(8, 800).with_chunk(16, 3000)
    assert load == StepLoad(8, 3800, 16, 16 * 3000 + 136)
    assert load.with_chunk(4, 0) == StepLoad(8, 3800, 20, 16 * 3000 + 136 + 10)


def test_after_five_steps_a_slower_machine_is_known() -> None:
    model = after_decoding(cpu)
    for _ in range(3):
        run(model, cpu, 0.12, prompt=4000)
    load = StepLoad(8, 800).with_chunk(100, 1000)
    for _ in range(5):
        model.observe(load, 1.6 * cpu(load))
    assert model.predict(load) == pytest.approx(1.6 * cpu(load), rel=0.05)
    alone = StepLoad(8, 800)  # what decodes alone take is seen all the time, and not scaled
    assert model.predict(alone) == pytest.approx(cpu(alone), rel=0.1)


def test_where_steps_are_late_now_and_then_less_is_planned() -> None:
    steady, unsteady = after_decoding(cpu), after_decoding(cpu)
    random_ = random.Random(3)

    def sometimes_late(load: StepLoad) -> float:
        return cpu(load) * (1.4 if random_.random() < 0.08 else 1.0)

    for _ in range(3):
        run(steady, cpu, 0.12, prompt=4000)
        run(unsteady, sometimes_late, 0.12, prompt=4000)
    run(unsteady, cpu, 0.12, prompt=500)  # the last steps were as fast as the other's
    load = StepLoad(8, 800)
    planned = [model.max_prefill_tokens(load, 2000, 0.12, 2048) for model in (steady, unsteady)]
    assert 0.6 * planned[0] < planned[1] < 0.9 * planned[0]


def test_steps_that_were_late_because_nothing_was_known_are_no_reason_for_caution() -> None:
    hasty, steady = after_decoding(cpu), after_decoding(cpu)
    load = StepLoad(8, 800).with_chunk(64, 1000)
    for _ in range(8):
        hasty.observe(load, cpu(load), expected_s=cpu(load) / 3)
        steady.observe(load, cpu(load), expected_s=cpu(load))
    planned = [model.max_prefill_tokens(StepLoad(8, 800), 1000, 0.06, 2048) for model in (hasty, steady)]
    assert planned[0] == planned[1]
    hasty.observe(load, cpu(load), expected_s=cpu(load) / 3)
    assert hasty.max_prefill_tokens(StepLoad(8, 800), 1000, 0.06, 2048) < 0.8 * planned[1]


def test_a_step_that_nobody_sized_says_nothing_about_lateness() -> None:
    model = after_decoding(cpu)
    run(model, cpu, 0.12, prompt=4000)
    usual = model.max_prefill_tokens(StepLoad(8, 800), 1000, 0.12, 2048)
    load = StepLoad(8, 800).with_chunk(100, 1000)
    for _ in range(40):
        model.observe(load, cpu(load))
    assert model.max_prefill_tokens(StepLoad(8, 800), 1000, 0.12, 2048) == pytest.approx(usual, rel=0.03)


def test_on_a_machine_that_changes_its_speed_few_steps_are_late() -> None:
    """60 % slower every few seconds, and back; each step 5 % off besides."""
    random_ = random.Random(5)
    clock = 0.0

    def restless(load: StepLoad) -> float:
        nonlocal clock
        seconds = cpu(load) * (1.6 if clock % 6 > 3 else 1.0) * random_.gauss(1, 0.05)
        clock += seconds
        return seconds

    model = after_decoding(cpu)
    run(model, restless, 0.12, prompt=4000)
    times = [time for _ in range(20) for time in run(model, restless, 0.12, prompt=4000)]
    assert sum(time > 1.3 * 0.12 for time in times) < 0.04 * len(times)
    assert sum(times) / len(times) > 0.6 * 0.12


def test_a_mixed_step_has_decodes_and_tokens_of_prompts() -> None:
    assert StepLoad(1, 10).with_chunk(1, 0).is_mixed
    assert not StepLoad(1, 10).is_mixed
    assert not StepLoad(0, 0).with_chunk(1, 0).is_mixed
