import torch


def test_reads_the_next_token_and_counts_it(device: torch.device) -> None:
    from folovllm.worker_proc.kernels.triton.decode_rows import gather_decode_inputs

    slots = torch.tensor([4, -1, 0], device=device)
    num_computed = torch.tensor([2, 5, 5, 5, 0], device=device)
    token_ids = (torch.arange(5)[:, None] * 100 + torch.arange(8)).to(torch.int32).to(device)
    outputs = [torch.full((3,), 99, device=device) for _ in range(3)]
    gather_decode_inputs(slots, num_computed, token_ids, *outputs)
    input_ids, positions, seq_lens = (each.tolist() for each in outputs)
    assert input_ids == [400, 0, 2]
    assert positions == [0, 0, 2]
    assert seq_lens == [1, 0, 3]
    assert num_computed.tolist() == [3, 5, 5, 5, 1]
