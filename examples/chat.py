"""A conversation: each answer is put to the messages, and the chat template of the model makes the prompt.

python examples/chat.py [MODEL]
"""

import sys

from folovllm import LLM, SamplingParams


def main() -> None:
    params = SamplingParams(temperature=0, max_tokens=60)
    messages = [{"role": "system", "content": "You are a helpful assistant. Answer in one sentence."}]
    with LLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
        for question in ("What is the capital of France?", "And of Italy?"):
            messages.append({"role": "user", "content": question})
            answer = llm.chat(messages, params, use_tqdm=False)[0].outputs[0].text
            messages.append({"role": "assistant", "content": answer})
            print(f"user:      {question}\nassistant: {answer}\n")


if __name__ == "__main__":
    main()
