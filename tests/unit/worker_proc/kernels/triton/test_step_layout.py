"""A step as a captured pass finds it, against the rows read one by one."""

import numpy as np
import pytest
import torch

NUM_SLOTS, MAX_MODEL_LEN, BLOCK_SIZE, TILE_TOKENS = 7, 700, 16, 64
NEVER = -7


@pytest.mark.parametrize("seed", range(4))
def test_every_token_is_where_the_plan_has_it(device: torch.device, seed: int) -> None:
    from folovllm.worker_proc.kernels.triton.paged_prefill import FIELDS, plan_tiles, split_tiles
    from folovllm.worker_proc.kernels.triton.step_layout import lay_out_step
    from folovllm.worker_proc.step_plan import PassInputs, Scheduled, StepPlan

    generator = np.random.default_rng(seed)
    token_ids = torch.randint(0, 1000, (NUM_SLOTS, MAX_MODEL_LEN), dtype=torch.int32, device=device)
    block_table = torch.randint(1, 900, (NUM_SLOTS, -(-MAX_MODEL_LEN // BLOCK_SIZE)), device=device)
    num_computed = torch.full((NUM_SLOTS,), NEVER, device=device)
    plan = StepPlan(NUM_SLOTS, 40, device)
    num_decodes, num_chunks = [(0, 1), (2, 0), (3, 2), (2, 4)][seed]
    slots = generator.permutation(NUM_SLOTS)[: num_decodes + num_chunks]
    query_lens = np.array([1] * num_decodes + generator.integers(2, 200, num_chunks).tolist())
    seq_lens = query_lens + generator.integers(0, 400, len(slots))
    samples = np.flatnonzero(generator.random(len(slots)) < 0.7)
    step = Scheduled(slots, query_lens, seq_lens, num_decodes, samples)
    decodes, tokens, num_tiles = 4, 1024, 30
    inputs = PassInputs.empty(decodes + tokens, 40, device)
    for tensor in (inputs.input_ids, inputs.positions, inputs.places):
        tensor.fill_(NEVER)
    chunk_lens = query_lens[num_decodes:].tolist(), seq_lens[num_decodes:].tolist()
    tiles = np.zeros((0, FIELDS), np.int32)
    if num_chunks:
        tiles = plan_tiles(*chunk_lens, slots[num_decodes:], decodes, TILE_TOKENS)
        tiles = split_tiles(tiles, num_tiles - len(tiles))
    plan.fill(step, decodes, tiles, num_tiles)
    rows = token_ids, block_table, num_computed
    lay_out_step(plan, rows, inputs, (decodes, tokens, num_tiles), BLOCK_SIZE)

    starts = [*range(num_decodes), *(decodes + np.cumsum([0, *chunk_lens[0]])[:-1])]
    ids, positions, places = (each.tolist() for each in (inputs.input_ids, inputs.positions, inputs.places))
    for slot, first, query_len, seq_len in zip(slots, starts, query_lens, seq_lens, strict=True):
        expected = range(int(seq_len - query_len), int(seq_len))
        assert positions[first : first + query_len] == list(expected)
        assert ids[first : first + query_len] == token_ids[slot, expected.start : expected.stop].tolist()
        if first >= decodes:
            blocks = block_table[slot].tolist()
            in_cache = [blocks[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for at in expected]
            assert places[first : first + query_len] == in_cache
        assert int(num_computed[slot]) == seq_len
    assert ids[num_decodes:decodes] == positions[num_decodes:decodes] == [0] * (decodes - num_decodes)
    assert set(places[decodes + sum(chunk_lens[0]) :]) <= {-1}
    assert int((num_computed == NEVER).sum()) == NUM_SLOTS - len(slots)
    planned = inputs.tiles[:num_tiles].tolist()
    assert planned == [*tiles.tolist(), *([[0] * FIELDS] * (num_tiles - len(tiles)))]
    last = [starts[row] + int(query_lens[row]) - 1 for row in samples]
    assert plan.sampling_tokens.tolist() == [*last, *([0] * (NUM_SLOTS - len(samples)))]
    assert plan.sampling_slots.tolist() == [*slots[samples], *([-1] * (NUM_SLOTS - len(samples)))]
    assert plan.sampling_lens[: len(samples)].tolist() == seq_lens[samples].tolist()


def test_a_plan_of_padding_changes_nothing(device: torch.device) -> None:
    from folovllm.worker_proc.kernels.triton.step_layout import lay_out_step
    from folovllm.worker_proc.step_plan import PassInputs, Scheduled, StepPlan

    plan = StepPlan(3, 5, device)
    step = Scheduled(np.array([2, 1]), np.array([1, 2]), np.array([5, 9]), 1, np.array([0]))
    plan.fill(step, 2, np.array([[1, 2, 7, 2, 0, 1, 9, 0]], np.int32), 5)
    assert plan.end.tolist() == [4]
    plan.clear()
    inputs = PassInputs.empty(6, 5, device)
    num_computed = torch.full((3,), NEVER, device=device)
    token_ids = torch.ones(3, 20, dtype=torch.int32, device=device)
    table = torch.ones(3, 2, dtype=torch.int64, device=device)
    lay_out_step(plan, (token_ids, table, num_computed), inputs, (2, 4, 5), BLOCK_SIZE)
    assert num_computed.tolist() == [NEVER] * 3
    assert inputs.places.tolist() == [-1] * 6
    assert int(inputs.positions.abs().sum()) == int(inputs.input_ids.sum()) == int(inputs.tiles.sum()) == 0
    assert plan.sampling_slots.tolist() == [-1] * 3
