"""The HTTP server: OpenAI's and Anthropic's APIs over `AsyncLLM`. Needs the extra `server`.

`app.build_app` makes the application, `serve.serve` runs it. An endpoint reads its body (`bodies`), turns it into a
prompt and SamplingParams (`sampling`), asks the engine (`answers`) and writes what comes (`sse`, or one JSON object).
"""
