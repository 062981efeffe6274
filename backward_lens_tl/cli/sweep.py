"""The arguments of a sweep on a command line."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from backward_lens_tl.errors import SweepError

if TYPE_CHECKING:
    from backward_lens_tl.sweeps import Sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a sweep.

    Settings that are not given are those of `--config`, or else of `SweepConfig`.

    Args:
        parser: What they are added to.
    """
    parser.add_argument(
        "--model",
        default="facts",
        help="'facts' (the default), a local folder, or a name on the hub",
    )
    parser.add_argument(
        "--data",
        default="facts",
        help="a .json (CounterFact), .jsonl, .csv, .tsv or .parquet file, a dataset's folder or "
        "name on the hub, or 'facts' (the default), the records of the facts model",
    )
    parser.add_argument("--out", required=True, help="the folder to write or to go on with")
    parser.add_argument(
        "--config", metavar="FILE", help="settings as JSON, or another sweep's run.json"
    )
    parser.add_argument(
        "--field",
        nargs="*",
        default=[],
        metavar="NAME=COLUMN",
        help="columns of other names, such as prompt=question target=new",
    )
    parser.add_argument(
        "--kind",
        choices=("bridge", "hooked"),
        help="TransformerLens's model class (default: the one that it prefers)",
    )
    parser.add_argument(
        "--device", help="such as cuda:1 (default: this process's own accelerator, if it has one)"
    )
    parser.add_argument(
        "--n-devices",
        type=int,
        default=1,
        help="GPUs that TransformerLens spreads the layers of a large model over",
    )
    parser.add_argument("--split", default="train", help="of a dataset (default: %(default)s)")
    parser.add_argument(
        "--quiet", action="store_true", help="no progress bar; the folder has a log in any case"
    )
    settings = parser.add_argument_group("settings, which --config may hold as well")
    settings.add_argument("--prompts", type=int, help="rows to take, at random (default: all)")
    settings.add_argument("--seed", type=int, help="of that choice (default: 0)")
    settings.add_argument("--matrices", nargs="+", metavar="NAME", help="default: mlp")
    settings.add_argument("--layers", nargs="+", type=int, metavar="N", help="default: all")
    settings.add_argument(
        "--projection", nargs="+", choices=("logit_lens", "normalized"), help="default: logit_lens"
    )
    settings.add_argument("--direction", choices=("update", "gradient"), help="default: update")
    settings.add_argument("--vjps-at", choices=("matrix", "residual"), help="default: matrix")
    settings.add_argument("--k", type=int, help="tokens kept at either end (default: 10)")
    settings.add_argument(
        "--position-columns", nargs="*", metavar="NAME", help="none leaves the table out"
    )
    settings.add_argument(
        "--gradient-columns", nargs="*", metavar="NAME", help="none leaves the table out"
    )
    settings.add_argument(
        "--bos",
        "--prepend-bos",
        dest="prepend_bos",
        action=argparse.BooleanOptionalAction,
        help="whether prompts get a BOS token (default: as the model does)",
    )
    settings.add_argument(
        "--multi-token",
        choices=("first", "last"),
        help="which token stands for a target of several (default: such a row is rejected)",
    )
    settings.add_argument("--part-size", type=int, help="prompts of a part (default: 64)")
    settings.add_argument("--budget", type=int, help="bytes a part may take beyond the model")


def run(args: argparse.Namespace) -> None:
    """Run the sweep that was asked for, and print what it found.

    Args:
        args: What `add_arguments` parsed.
    """
    from backward_lens_tl.data.readers import read_records
    from backward_lens_tl.files.distributed import own_device, this_process
    from backward_lens_tl.models.loading import load_model, without_progress_bars
    from backward_lens_tl.sweeps import SweepConfig, sweep

    base = SweepConfig() if args.config is None else SweepConfig.load(args.config)
    given = {
        name: getattr(args, name) for name in base.to_json() if getattr(args, name) is not None
    }
    records = read_records(args.data, fields=_fields(args.field), split=args.split)
    state = this_process()
    device = args.device or own_device(state)
    with without_progress_bars() if args.quiet else nullcontext():
        model = load_model(args.model, args.kind, device=device, n_devices=args.n_devices)
    found = sweep(model, records, args.out, replace(base, **given), progress=not args.quiet)
    if state.is_main_process:
        sys.stdout.write(f"{_summary(found)}\n")


def _summary(found: Sweep) -> str:
    """How many prompts were analysed, and why others were not."""
    prompts, rejects = found.prompts(), found.rejects()
    lines = [f"{len(prompts)} prompts analysed, {len(rejects)} rejected: {found.folder}"]
    lines += [
        f"  {count} rejected for their {reason}, such as row {first.prompt}: {first.problem}"
        for reason, count in Counter(rejects["reason"]).most_common()
        for first in [_first(rejects, reason)]
    ]
    return "\n".join(lines)


def _first(rejects: Any, reason: str) -> Any:
    return next(rejects[rejects["reason"] == reason].itertuples())


def _fields(pairs: list[str]) -> dict[str, str] | None:
    named = [pair.partition("=") for pair in pairs]
    for name, sign, column in named:
        if not (name and sign and column):
            raise SweepError(f"--field {name}{sign}{column} names no column; write prompt=question")
    return {name: column for name, _, column in named} or None
