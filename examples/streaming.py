"""Prints an answer while it is made.

python examples/streaming.py [MODEL]
"""

import sys

from folovllm import LLM, SamplingParams


def main() -> None:
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=80)
    with LLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
        # The outputs of a stream hold what is new. Leaving the `with` block early would abort the request.
        with llm.stream("Once upon a time", params) as stream:
            for output in stream:
                print(output.outputs[0].text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
