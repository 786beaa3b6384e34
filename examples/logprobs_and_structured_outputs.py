"""How sure the model is of what it says, and answers that a program can read.

python examples/logprobs_and_structured_outputs.py [MODEL]
"""

import json
import math
import sys

from folovllm import LLM, SamplingParams, StructuredOutputsParams

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def main() -> None:
    with LLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
        # Each token comes with its own log probability and those of the three most likely ones.
        params = SamplingParams(temperature=0, max_tokens=5, logprobs=3)
        (output,) = llm.generate("The capital of France is", params, use_tqdm=False)
        for place in output.outputs[0].logprobs or ():
            print("   ".join(f"{entry.decoded_token!r} {math.exp(entry.logprob):.0%}" for entry in place.values()))

        # One of a few texts; the probability of all its tokens together says how sure the model is.
        choice = StructuredOutputsParams(choice=["positive", "negative"])
        params = SamplingParams(temperature=0, max_tokens=8, logprobs=0, structured_outputs=choice)
        question = [{"role": "user", "content": "Is this review positive or negative? 'I would buy it again.'"}]
        answer = llm.chat(question, params, use_tqdm=False)[0].outputs[0]
        print(answer.text, f"{math.exp(answer.cumulative_logprob or 0.0):.0%} before all else was ruled out")

        # A JSON object of a given shape, whatever the model would rather say.
        params = SamplingParams(
            temperature=0.3, seed=1, max_tokens=60, structured_outputs=StructuredOutputsParams(json=PERSON)
        )
        question = [{"role": "user", "content": "Invent a person, as JSON with name and age."}]
        answer = llm.chat(question, params, use_tqdm=False)[0].outputs[0]
        print(json.loads(answer.text) if answer.finish_reason == "stop" else f"not finished: {answer.text!r}")


if __name__ == "__main__":
    main()
