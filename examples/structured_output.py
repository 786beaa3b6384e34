"""Answers that a program can read: one of several texts, a regular expression, a JSON schema, a grammar.

python examples/structured_output.py [MODEL]
"""

import json
import sys
from typing import Any

from folovllm import LLM, SamplingParams, StructuredOutputsParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "born": {"type": "string", "format": "date"},
        "languages": {"type": "array", "items": {"enum": ["de", "en", "fr"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "born", "languages"],
    "additionalProperties": False,
}
SUM = """
start: NUMBER (" + " NUMBER)+ " = " NUMBER
NUMBER: /[1-9][0-9]{0,2}/
"""


def main() -> None:
    with LLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:

        def ask(question: str, **constraint: Any) -> str:
            held = StructuredOutputsParams(**constraint)
            params = SamplingParams(temperature=0.5, seed=3, max_tokens=80, structured_outputs=held)
            answer = llm.chat([{"role": "user", "content": question}], params, use_tqdm=False)[0].outputs[0]
            return answer.text if answer.finish_reason == "stop" else f"{answer.text}… (not finished)"

        print(ask("Is Paris in France or in Italy?", choice=["France", "Italy"]))
        print(ask("When did the first human walk on the Moon?", regex="(January|July|October) 19[0-9]{2}"))
        print(ask("Write a sum.", grammar=SUM))
        person = ask("Invent a person, as JSON.", json=PERSON)
        print(json.loads(person) if person.endswith("}") else person)

        try:
            ask("Anything.", json={"type": "objekt"})
        except ValueError as error:
            print("refused:", error)


if __name__ == "__main__":
    main()
