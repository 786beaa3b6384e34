"""Measures servers and engines: what `folovllm bench` runs. `serving` puts load on any OpenAI-compatible server."""
