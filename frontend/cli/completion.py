"""`folovllm completion`: the script that makes a shell complete commands, options and their values."""

import click
from click.shell_completion import get_completion_class

from folovllm.frontend.cli.options import GroupedCommand

_SHELLS = ("bash", "zsh", "fish")
_PROGRAM = "folovllm"
_VARIABLE = "_FOLOVLLM_COMPLETE"  # what click looks for, made of the program's name
_EXAMPLES = (
    'eval "$(folovllm completion bash)"      # in ~/.bashrc',
    'eval "$(folovllm completion zsh)"       # in ~/.zshrc, behind compinit',
    "folovllm completion fish | source       # in ~/.config/fish/config.fish",
)


@click.command(cls=GroupedCommand, examples=_EXAMPLES, short_help="Prints a shell's completion script.")
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Prints the script with which SHELL completes commands, options and their values.

    It runs folovllm at each press of Tab, which loads nothing heavy. Bash must be 4.4 or later.
    """
    found = get_completion_class(shell)
    assert found is not None, "click knows all of _SHELLS"
    click.echo(found(context.find_root().command, {}, _PROGRAM, _VARIABLE).source())
