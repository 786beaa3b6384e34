"""`folovllm bench`: measures a server, or an engine without one."""

import click

from folovllm.frontend.cli.bench_offline import latency, throughput
from folovllm.frontend.cli.bench_serve import serve


@click.group(short_help="Measures a server or an engine.")
def bench() -> None:
    """Measures a server under load, or an engine without one."""


for _command in (serve, latency, throughput):
    bench.add_command(_command)
