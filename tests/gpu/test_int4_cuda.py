"""4-bit weights on the card: products of real shapes, captured ones, and a whole model against its unquantized copy."""

import pathlib

import pytest
import torch
import torch.nn.functional as F

from folovllm import LLM, SamplingParams
from folovllm.worker_proc.device import place
from folovllm.worker_proc.layers.norm import RMSNorm
from tests.fakes.gptq_models import Format, make_gptq_model
from tests.fakes.int4_weights import random_weight, relative_error, to_device
from tests.fakes.model_folder import NUM_IDS, write_tokenizer
from tests.fakes.oracle import GreedyOracle, random_prompts

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SHAPES = [(1024, 2048), (6144, 1024), (1152, 576)]  # of Qwen3-0.6B; one with padding
ROWS = (1, 2, 8, 33, 100, 300)
TIE_GAP = 0.15  # logits of such a model spread by about 1.2; bf16 moves them by some hundredths


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sym", "group_size", "shuffled"), [(True, 128, False), (False, 32, True), (False, -1, False)])
def test_products_of_real_shapes(dtype: torch.dtype, sym: bool, group_size: int, shuffled: bool) -> None:
    from folovllm.worker_proc.layers.int4_triton_linear import Int4Scratch, words_linear

    placement = place(CUDA, dtype)
    scratch, generator = Int4Scratch(placement), torch.Generator("cuda").manual_seed(0)
    for outputs, inputs in SHAPES:
        weight = to_device(random_weight(outputs, inputs, group_size, sym=sym, shuffled=shuffled), CUDA)
        layer, plain = words_linear(weight, None, scratch), weight.dequantize(torch.float64)
        assert layer is not None
        norm = RMSNorm(inputs, 1e-6, placement)
        norm.weight.uniform_(0.5, 1.5, generator=generator)
        for rows in ROWS:
            x = torch.randn(rows, inputs, generator=generator, device="cuda").to(dtype)
            normed = F.rms_norm(x.float(), (inputs,), norm.weight.float(), 1e-6).to(dtype).double() @ plain.t()
            gate, up = normed.chunk(2, 1)
            total = torch.ones(rows, outputs, dtype=dtype, device="cuda")
            layer.add_to(total, x)
            for actual, expected, most in (
                (layer(x), x.double() @ plain.t(), 5e-3),
                (layer.of_normed(x, norm), normed, 5e-3),
                (layer.gated(x, norm), F.silu(gate) * up, 1e-2),  # many rows: gate and up are rounded in between
                (total, 1 + x.double() @ plain.t(), 5e-3),
            ):
                assert relative_error(actual, expected.cpu()) < most, (outputs, inputs, rows)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 2, 8, 64, 300])
def test_captured_products_are_those_of_the_same_calls_and_nothing_waits(rows: int) -> None:
    """Products one after another, as a layer has them: each may begin before the one before it is through."""
    from folovllm.worker_proc.layers.int4_triton_linear import Int4Scratch, words_linear

    placement = place(CUDA, torch.bfloat16)
    scratch = Int4Scratch(placement)
    weights = (random_weight(6144, 1024, 128, sym=True), random_weight(1024, 3072, 64, sym=False, shuffled=True))
    gate_up, down = (words_linear(to_device(weight, CUDA), None, scratch) for weight in weights)
    assert gate_up is not None and down is not None
    norm = RMSNorm(1024, 1e-6, placement)
    norm.weight.fill_(1.0)
    given, hidden = (torch.empty(rows, 1024, dtype=torch.bfloat16, device="cuda") for _ in range(2))

    def step() -> None:
        hidden.copy_(given)
        for _ in range(6):
            down.add_to(hidden, gate_up.gated(hidden, norm))

    given.normal_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph, stream=stream):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed in range(3):
        given.normal_(generator=torch.Generator("cuda").manual_seed(seed))
        step()
        expected = hidden.clone()
        for _ in range(3):  # counters and shared memory are left as they were found
            hidden.zero_()
            graph.replay()
            assert torch.equal(hidden, expected)


@pytest.mark.parametrize("form", [Format(), Format(sym=False, group_size=16, order="own")], ids=["plain", "own orders"])
@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_greedy_answers_are_those_of_the_unquantized_copy_up_to_ties(
    tmp_path: pathlib.Path, family: str, form: Format
) -> None:
    """One request and several, prompts short and long: every kernel has a part, inside captured steps."""
    quantized, plain = make_gptq_model(tmp_path, family, form, vocab_size=NUM_IDS, max_position_embeddings=512)
    write_tokenizer(quantized)
    oracle, prompts = GreedyOracle(plain, "cuda"), random_prompts(NUM_IDS, [1, 7, 16, 33, 90, 300])
    greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    with LLM(quantized, dtype="bfloat16", device="cuda", gpu_memory_utilization=0.2) as llm:
        together = llm.generate(prompts, greedy, use_tqdm=False)
        alone = [llm.generate([prompt], greedy, use_tqdm=False)[0] for prompt in prompts]
    for prompt, *outputs in zip(prompts, together, alone, strict=True):
        for output in outputs:
            oracle.check(prompt, list(output.outputs[0].token_ids), tie_gap=TIE_GAP)
