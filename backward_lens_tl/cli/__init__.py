"""The command `backward-lens`.

Importing this module is cheap: torch and TransformerLens are imported when it is called.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from backward_lens_tl.cli import evaluate, reproduce, sweep
from backward_lens_tl.errors import BackwardLensError, one_line

if TYPE_CHECKING:
    from backward_lens_tl.readout.cells import Cell
    from backward_lens_tl.result import BackwardLensResult

_PROG = "backward-lens"
_LENSES = ("logit_lens", "normalized")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments; `None` for those of the process.

    Returns:
        The exit status: 0, or 2 after an error, which is one line on stderr.
    """
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # tokens hold what no terminal's encoding may have
    try:
        args.run(args)
    except (BackwardLensError, OSError) as error:
        print(f"{_PROG}: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


# --- arguments ----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG, description="Which tokens a language model's gradients write into its weights."
    )
    parser.add_argument("--version", action="version", version=_versions())
    commands = parser.add_subparsers(dest="command", required=True)
    _add_show(commands.add_parser("show", help="the layers x tokens table of one prompt"))
    for name, command, what in (
        ("sweep", sweep, "the lens over a data set, as Parquet"),
        ("evaluate", evaluate, "methods of editing on CounterFact, as Parquet"),
        ("reproduce", reproduce, "the paper's experiments, with a report"),
    ):
        own = commands.add_parser(name, help=what)
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    return parser


def _add_show(show: argparse.ArgumentParser) -> None:
    show.set_defaults(run=_show)
    show.add_argument("--prompt", required=True, help='text, such as "Lionel Messi plays for"')
    show.add_argument(
        "--target",
        help='what the model should say next, such as " Paris"; by default its own answer',
    )
    show.add_argument(
        "--model",
        default="facts",
        help="'facts' (the default), which ships with this package; a local folder in Hugging Face "
        "format; or a name on the hub, such as gpt2",
    )
    show.add_argument("--html", metavar="FILE", help="also write the table as a page")
    show.add_argument(
        "--matrices",
        nargs="+",
        default=["mlp"],
        metavar="NAME",
        help="W_Q, W_K, W_V, W_O, W_in, W_gate, W_out, or the groups attn, mlp, all (default: mlp)",
    )
    show.add_argument("--layers", nargs="+", type=int, metavar="N", help="default: all")
    show.add_argument(
        "--positions", nargs="+", type=int, metavar="N", help="tokens of the prompt (default: all)"
    )
    show.add_argument(
        "--projection",
        choices=_LENSES,
        default=_LENSES[0],
        help="how vectors are read; the page shows both and begins with this one "
        "(default: %(default)s)",
    )
    show.add_argument(
        "--direction",
        choices=["update", "gradient"],
        default="update",
        help="W_out and W_O as what gradient descent adds, or as the raw gradient "
        "(default: %(default)s)",
    )
    show.add_argument(
        "--vjps-at",
        choices=["matrix", "residual"],
        default="matrix",
        help="W_out and W_O at the matrix's own output, or where that joins the residual stream; "
        "they differ behind a post-norm (default: %(default)s)",
    )
    show.add_argument(
        "--k", type=int, default=10, help="tokens kept at either end (default: %(default)s)"
    )
    show.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="whether the prompt gets a BOS token (default: as the model does)",
    )
    show.add_argument(
        "--multi-token",
        choices=["first", "last"],
        help="which token stands for a target of several",
    )
    show.add_argument(
        "--kind",
        choices=["bridge", "hooked"],
        help="TransformerLens's model class (default: the one that it prefers)",
    )


def _versions() -> str:
    names = ("backward-lens-tl", "transformer-lens", "torch")
    return ", ".join(f"{name} {_version(name)}" for name in names)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"


# --- show ---------------------------------------------------------------------------------------


def _show(args: argparse.Namespace) -> None:
    with _quiet():
        result = _result(args)
    if args.html is not None:
        result.save_html(args.html)  # first: a reader such as `head` may close the pipe below
    from rich.console import Console

    from backward_lens_tl.views.terminal import TerminalTable

    console = Console()
    console.print(_heading(result), markup=False, highlight=False)
    console.print(TerminalTable(result))
    console.print(_explanation(result), markup=False, highlight=False)
    if args.html is not None:
        console.print(f"page: {args.html}", markup=False, highlight=False, soft_wrap=True)


def _result(args: argparse.Namespace) -> BackwardLensResult:
    from backward_lens_tl.lens import backward_lens
    from backward_lens_tl.models.loading import load_model

    return backward_lens(
        load_model(args.model, args.kind),
        args.prompt,
        args.target,
        matrices=args.matrices,
        layers=args.layers,
        positions=args.positions,
        projection=sorted(_LENSES, key=lambda lens: lens != args.projection),
        direction=args.direction,
        vjps_at=args.vjps_at,
        k=args.k,
        prepend_bos=args.bos,
        multi_token=args.multi_token,
    )


def _heading(result: BackwardLensResult) -> str:
    from backward_lens_tl.views.text import number

    prompt = result.capture.prompt(0)
    loss = number(float(result.capture.loss[0]))
    return (
        f"{prompt!r}, target {result.target()!r}: loss {loss} "
        f"({result.projection}, {result.direction}, {result.capture.model_name})\n"
    )


def _explanation(result: BackwardLensResult) -> str:
    """How to read the table, and where the target leads."""
    read = (
        "A cell holds the token with the highest score at one layer and token of the prompt; its "
        "colour is the norm of delta_i, how strongly it writes. ★: the target leads. "
        "·: adds nothing."
    )
    if "W_out" not in result.matrices:
        return read
    final = int(result.positions.max())
    raw, direction = (
        [result.under(lens).cell("W_out", layer, final) for layer in result.layers]
        for lens in _LENSES
    )
    first = raw[0]
    where = f"W_out at {first.token!r} (position {first.position})"
    if result.direction == "gradient":
        return f"{read}\n{where} is the raw gradient, which gradient descent subtracts."
    return (
        f"{read}\n{where}, what the update adds: the target {result.target()!r} leads in "
        f"{_leads(raw)} of {len(raw)} layers, and under the normalized lens in "
        f"{_leads(direction)}."
    )


def _leads(cells: Sequence[Cell]) -> int:
    return sum(cell.target_leads for cell in cells)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' progress bars, warnings and prints off the command's output."""
    from backward_lens_tl.models.loading import without_progress_bars

    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with without_progress_bars():
                yield
    finally:
        logging.disable(disabled)
