"""The arguments of `backward-lens evaluate`."""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

from backward_lens_tl.errors import EvaluationError

if TYPE_CHECKING:
    from backward_lens_tl.evaluation import Evaluation

_RECORDS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of an evaluation.

    Args:
        parser: What they are added to.
    """
    parser.add_argument(
        "--model",
        default="facts",
        help="'facts' (the default), a local folder, or a name on the hub",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help="presets, such as shift rome (default: all)",
    )
    parser.add_argument(
        "--data",
        default="facts",
        help="a .json (CounterFact), .jsonl, .csv, .tsv or .parquet file, a dataset's folder or "
        "name on the hub, or 'facts' (the default), the records of the facts model",
    )
    parser.add_argument("--split", default="train", help="of a dataset (default: %(default)s)")
    parser.add_argument("--out", required=True, help="the folder to write or to go on with")
    parser.add_argument(
        "--kind",
        choices=("bridge", "hooked"),
        help="TransformerLens's model class (default: the one that it prefers)",
    )
    parser.add_argument(
        "--device", help="such as cuda:1 (default: this process's own accelerator, if it has one)"
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress bar; the folder has a log in any case"
    )
    settings = parser.add_argument_group("settings")
    settings.add_argument("--records", type=int, help=f"how many, the first (default: {_RECORDS})")
    settings.add_argument(
        "--rows", metavar="FIRST:END", help="rows to take instead, such as 100:200"
    )
    settings.add_argument(
        "--edits-at-once", type=int, help="records that are taught with one edit (default: 1)"
    )
    settings.add_argument(
        "--bos",
        dest="prepend_bos",
        action=argparse.BooleanOptionalAction,
        help="whether prompts get a BOS token (default: none, as in the paper)",
    )
    settings.add_argument("--neighbors", type=int, help="of each record (default: all)")
    settings.add_argument(
        "--generation-length",
        type=int,
        help="tokens, prompt included; 0 for no generations (default: 100)",
    )
    settings.add_argument("--top-k", type=int, help="of generations (default: 5)")
    settings.add_argument("--seed", type=int, help="of generations and bootstrap (default: 0)")
    settings.add_argument(
        "--texts",
        help="of perplexity: 'facts', 'Salesforce/wikitext', or a file with one entry per line "
        "(default: the first for the facts model, else the second)",
    )
    settings.add_argument("--n-texts", type=int, help="0 for no perplexity (default: 100)")
    settings.add_argument("--denominator", choices=("n", "n-1"), help="default: n")
    settings.add_argument("--batch-size", type=int, help="prompts of a pass (default: 64)")


def run(args: argparse.Namespace) -> None:
    """Run the evaluation that was asked for, and print its table.

    Args:
        args: What `add_arguments` parsed.
    """
    from backward_lens_tl.data.readers import read_records
    from backward_lens_tl.evaluation import EvaluationConfig, evaluate
    from backward_lens_tl.files.distributed import own_device, this_process
    from backward_lens_tl.models.loading import load_model, without_progress_bars

    known = EvaluationConfig().to_json()
    given = {name: value for name, value in vars(args).items() if name in known}
    if args.rows is not None:
        given["rows"] = _rows(args.rows)
    elif args.records is None:
        given["records"] = _RECORDS  # of all there would be none left to learn from
    config = EvaluationConfig(**{name: value for name, value in given.items() if value is not None})
    records = read_records(args.data, split=args.split)
    state = this_process()
    with without_progress_bars() if args.quiet else nullcontext():
        model = load_model(args.model, args.kind, device=args.device or own_device(state))
    found = evaluate(model, records, args.out, args.methods, config, progress=not args.quiet)
    if state.is_main_process:
        sys.stdout.write(f"{found.to_markdown()}\n\n{_said(found)}\n")


def _rows(text: str) -> range:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise EvaluationError(f"--rows {text} is no FIRST:END; write 100:200 for rows 100 to 199")
    return range(int(match[1]), int(match[2]))


def _said(found: Evaluation) -> str:
    rejects, edits = found.rejects(), found.edits()
    lines = [f"perplexity of {found.run['texts']['name']}; tables: {found.folder}"]
    lines += [
        f"  row {each.record} left out: {each.problem}" for each in rejects.head(3).itertuples()
    ]
    lines += [f"  ... and {len(rejects) - 3} more rows"] if len(rejects) > 3 else []
    failed = edits[edits["error"].notna()].drop_duplicates("method")
    lines += [
        f"  {each.method} failed, first at row {each.record}: {each.error}"
        for each in failed.itertuples()
    ]
    return "\n".join(lines)
