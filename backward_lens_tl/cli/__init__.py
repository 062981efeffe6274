"""The command `backward-lens`.

Importing this module is cheap: torch and TransformerLens are imported when a command runs.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from importlib.metadata import version

from backward_lens_tl.cli.adapter import AdapterCommand
from backward_lens_tl.cli.diff import DiffCommand
from backward_lens_tl.cli.evaluate import EvaluateCommand
from backward_lens_tl.cli.fit_jacobian import FitJacobianCommand
from backward_lens_tl.cli.options import Command, add_options, run_command
from backward_lens_tl.cli.reproduce import ReproduceCommand
from backward_lens_tl.cli.show import ShowCommand
from backward_lens_tl.cli.sweep import SweepCommand
from backward_lens_tl.errors import BackwardLensError, one_line

_PROG = "backward-lens"
COMMANDS: dict[str, type[Command]] = {
    "show": ShowCommand,
    "sweep": SweepCommand,
    "evaluate": EvaluateCommand,
    "reproduce": ReproduceCommand,
    "fit-jacobian": FitJacobianCommand,
    "adapter": AdapterCommand,
    "diff": DiffCommand,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments; `None` for those of the process.

    Returns:
        The exit status: 0, or 2 after an error, which is one line on stderr.
    """
    given = vars(parser().parse_args(argv))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may lack characters
    try:
        run_command(COMMANDS[given.pop("command")], given)
    except (BackwardLensError, OSError) as error:
        print(f"{_PROG}: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    top = argparse.ArgumentParser(
        prog=_PROG,
        description="Show which tokens a language model's gradients write into its weights.",
    )
    top.add_argument("--version", action="version", version=_versions())
    commands = top.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        what = (command.__doc__ or "").partition("\n")[0]
        add_options(commands.add_parser(name, help=what, description=what), command)
    return top


def _versions() -> str:
    names = ("backward-lens-tl", "transformer-lens", "torch")
    return ", ".join(f"{name} {version(name)}" for name in names)
