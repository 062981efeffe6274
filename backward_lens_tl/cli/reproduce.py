"""The arguments of `backward-lens reproduce`."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `reproduce`.

    Args:
        parser: What they are added to.
    """
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="fig1, fig3 ... fig24, table1 ... table7, gradients, editing, or all",
    )
    parser.add_argument(
        "--model",
        default="facts",
        help="'facts' (the default), a local folder, or a name on the hub, such as gpt2-xl",
    )
    parser.add_argument(
        "--data",
        help="as in `backward-lens sweep` (default: the facts model's own records for it, and the "
        "hub's CounterFact for other models)",
    )
    parser.add_argument("--split", default="train", help="of a dataset (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of their choice (default: 0)")
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="whether prompts get a BOS token (default: none, as in the paper)",
    )
    parser.add_argument(
        "--out", default="reproduced", metavar="FOLDER", help="default: ./%(default)s"
    )
    parser.add_argument(
        "--kind",
        choices=("bridge", "hooked"),
        help="TransformerLens's model class (default: the one that it prefers)",
    )
    parser.add_argument("--device", help="such as cuda (default: as load_model chooses)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> None:
    """Run the experiments that were asked for, and print what they found.

    Args:
        args: What `add_arguments` parsed.
    """
    from backward_lens_tl.data.readers import read_records
    from backward_lens_tl.models.loading import load_model, without_progress_bars
    from backward_lens_tl.reproduction import default_data, reproduce
    from backward_lens_tl.reproduction.experiments import select_experiments

    experiments = select_experiments(args.names)  # before a large model is loaded
    data = args.data or default_data(args.model, experiments)
    with without_progress_bars() if args.quiet else nullcontext():
        model = load_model(args.model, args.kind, device=args.device)
    found = reproduce(
        model,
        read_records(data, split=args.split),
        args.out,
        args.names,
        prompts=args.prompts,
        seed=args.seed,
        prepend_bos=args.bos,
        progress=not args.quiet,
    )
    for name, finding in found.items():
        sys.stdout.write(f"{name}: {finding.verdict}\n")
        for check in finding.checks:
            mark = "+" if check.holds else "-"
            exceptions = f" (but {check.exceptions})" if check.exceptions else ""
            sys.stdout.write(f"  {mark} {check.claim}: {check.found}{exceptions}\n")
        for note in () if finding.checks else finding.notes:
            sys.stdout.write(f"  {note}\n")
    sys.stdout.write(f"report: {Path(args.out) / 'report.html'}\n")
