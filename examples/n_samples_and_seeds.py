"""Several answers to one prompt, and how to get the same ones again.

python examples/n_samples_and_seeds.py [MODEL]
"""

import sys

from folovllm import LLM, SamplingParams


def main() -> None:
    # The answers share the prompt's KV cache. Each has its own random numbers, all of them fixed by the seed.
    params = SamplingParams(n=3, seed=7, temperature=0.9, max_tokens=20)
    prompt = "My favourite animal is"
    with LLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
        first = [answer.text for answer in llm.generate(prompt, params, use_tqdm=False)[0].outputs]
        again = [answer.text for answer in llm.generate(prompt, params, use_tqdm=False)[0].outputs]
    for text in first:
        print(f"{prompt} → {text!r}")
    print("the same again:", first == again)


if __name__ == "__main__":
    main()
