"""The command line. Only click is imported until a command runs, so that help pages come at once.

Exit codes: 0 done; 1 the engine could not start, or failed; 2 wrong input; 130 and 143 ended by SIGINT and SIGTERM.
"""

import os
import signal
import sys
from collections.abc import Sequence

import click

import folovllm
from folovllm.frontend.cli.bench import bench
from folovllm.frontend.cli.chat import chat
from folovllm.frontend.cli.completion import completion
from folovllm.frontend.cli.engine import engine
from folovllm.frontend.cli.env import env
from folovllm.frontend.cli.generate import generate
from folovllm.frontend.cli.quantize import quantize
from folovllm.frontend.cli.run_batch import run_batch
from folovllm.frontend.cli.serve import serve
from folovllm.frontend.cli.stop_signals import SHELL_SIGNAL_BASE, exit_in_order
from folovllm.frontend.cli.trace import trace


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(folovllm.__version__, prog_name="folovllm")
def cli() -> None:
    """FoloVLLM, an LLM inference engine.

    MODEL is a local Hugging Face folder, a hub id such as Qwen/Qwen3-0.6B, or 'demo': a small model that is made on
    first use.
    """


for _command in (generate, chat, serve, engine, run_batch, quantize, bench, env, trace, completion):
    cli.add_command(_command)


def main(args: Sequence[str] | None = None, prog_name: str = "folovllm") -> None:
    """Runs one command and ends the process with its exit code."""
    exit_in_order(signal.SIGTERM)
    sys.exit(run(args, prog_name))


def run(args: Sequence[str] | None = None, prog_name: str = "folovllm") -> int:
    """Runs one command; returns the exit code. Errors that FoloVLLM raises on purpose are one line on stderr."""
    try:
        result = cli.main(args=None if args is None else list(args), prog_name=prog_name, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return SHELL_SIGNAL_BASE + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit complains once more
        return 1
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        click.echo(f"Error: {error}", err=True)
        return code


def _exit_code(error: Exception) -> int | None:
    """The code for an error that FoloVLLM raises on purpose; None for any other: a bug, which shows its traceback."""
    from folovllm.common.errors import ConfigError, FoloVLLMError, ModelError, RequestError

    if isinstance(error, ConfigError | ModelError | RequestError):
        return 2
    return 1 if isinstance(error, FoloVLLMError) else None
