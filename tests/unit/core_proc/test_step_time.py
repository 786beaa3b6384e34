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
    """Steps' times while a prompt is computed beside decodes, chunk by chunk as the model says."""
    random_ = random.Random(1)
    times = []
    computed, context = 0, decodes * 100
    while computed < prompt:
        load = StepLoad(decodes, context)
        chunk = max(16, model.max_prefill_tokens(load, computed, target_s, min(2048, prompt - computed)))
        load = load.with_chunk(min(chunk, prompt - computed), computed)
        times.append(machine(load) * (1 + random_.uniform(-noise, noise)))
        model.observe(load, times[-1])
        computed += chunk
        context += decodes
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
    assert max(times) <= target_s * (1.05 + 2 * noise)
    whole = times[:-1]  # the last chunk is what is left
    assert sum(whole) / len(whole) >= 0.85 * target_s


@pytest.mark.parametrize("machine", [cpu, gpu])
def test_the_first_prompt_ever_does_not_break_the_target(machine: Machine) -> None:
    target_s = 4 * machine(StepLoad(8, 800))
    model = after_decoding(machine)
    times = run(model, machine, target_s, prompt=4000)
    assert max(times) <= 1.1 * target_s
    assert sum(times[4:-1]) / len(times[4:-1]) >= 0.8 * target_s


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


def test_a_pause_of_the_machine_is_left_out() -> None:
    model = after_decoding(cpu)
    run(model, cpu, 0.12, prompt=4000)
    expected = model.predict(StepLoad(8, 800).with_chunk(100, 0))
    model.observe(StepLoad(8, 800).with_chunk(100, 0), 5.0)
    assert model.predict(StepLoad(8, 800).with_chunk(100, 0)) == pytest.approx(expected, rel=0.02)


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
    run(steady, cpu, 0.12, prompt=8000)
    random_ = random.Random(3)

    def sometimes_late(load: StepLoad) -> float:
        return cpu(load) * (1.4 if random_.random() < 0.08 else 1.0)

    run(unsteady, sometimes_late, 0.12, prompt=8000)
    load = StepLoad(8, 800)
    planned = [model.max_prefill_tokens(load, 2000, 0.12, 2048) for model in (steady, unsteady)]
    assert 0.6 * planned[0] < planned[1] < 0.9 * planned[0]
