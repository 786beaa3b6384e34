"""Answers several prompts at once.

    python examples/offline_inference.py [MODEL]

MODEL is a folder, a hub id, or `demo` (the default): a small model that is made on first use.
"""

import sys

from folovllm import LLM, SamplingParams


def main() -> None:
    prompts = [
        "The capital of France is",
        "Water boils at a temperature of",
        "The three primary colours are",
    ]
    params = SamplingParams(temperature=0, max_tokens=24, stop=["\n"])
    # One call with all prompts: the engine computes them together, which is much faster than one after another.
    with LLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
        for output in llm.generate(prompts, params):
            answer = output.outputs[0]
            print(f"{output.prompt}{answer.text}   [{answer.finish_reason}]")


if __name__ == "__main__":
    main()
