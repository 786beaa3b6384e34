"""Uses an engine that runs already, so that this script starts in a moment.

folovllm engine demo --listen ipc:///tmp/engine.sock      (in another terminal; stays up)
python examples/daemon_client.py ipc:///tmp/engine.sock
"""

import sys

from folovllm import LLM, SamplingParams


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    # The model and all of its options belong to the engine; several scripts may use it at once.
    with LLM(engine=sys.argv[1]) as llm:
        (output,) = llm.generate(
            "The capital of France is", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False
        )
        print(output.prompt, output.outputs[0].text)
        stats = llm.get_stats()
        print(f"{stats.num_frontends} frontend(s), {stats.num_output_tokens_total} tokens since the engine started")


if __name__ == "__main__":
    main()
