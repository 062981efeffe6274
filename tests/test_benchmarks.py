"""The benchmarks time the same work for all contestants, and report correct numbers."""

from __future__ import annotations

import fcntl
import gc
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from models import hooked_only, relative_error
from torch.utils.flop_counter import FlopCounterMode
from type_checks import type_checks_off

from benchmarks import __main__ as command
from benchmarks import contestants, estimates, figures, gpu_check, memory, report
from benchmarks.bench import BATCHES, POSITIONS
from benchmarks.estimates import Limits, floor_bytes, floor_flops
from benchmarks.goals import GOALS, NotMeasured
from benchmarks.phases import PHASES, Step, by_phase, phases
from benchmarks.results import read_results, write_results
from benchmarks.sizes import DTYPES, LLAMA, SIZES, SMALL, Size, bridge, hooked, question, shrunk
from benchmarks.timing import Effort, OutOfMemory, Timings, interleave, settled

pytestmark = pytest.mark.usefixtures("as_for_a_user")

GPT2 = Size("gpt2-small", 3, 48, 4, 96, 500)
GATED = Size("llama-1b", 2, 64, 8, 160, 700, n_key_value_heads=2)
TINY = pytest.mark.parametrize("size", [GPT2, GATED], ids=["gpt2", "llama"])

UNLIMITED = Limits(math.inf, 2**62, {"float32": 1.0, "bfloat16": 1.0})

reads_peaks = pytest.mark.skipif(
    memory.why_not_measured("cpu") is not None, reason=str(memory.why_not_measured("cpu"))
)
has_tool = pytest.mark.skipif(
    contestants.why_no_tool(GPT2) is not None, reason=str(contestants.why_no_tool(GPT2))
)


@pytest.fixture(scope="module", autouse=True)
def _settled():
    """Freeze garbage collection, which would take a third of a second per timing."""
    with settled():
        yield


# ------------------------------------------------------------------------------------ same answers


def ask(size, batch=2, positions=7):
    return question(size, batch, positions, "cpu")


def with_gains(model):
    """A model with gains in its final norm, so that the norm changes the order of scores."""
    generator = torch.Generator().manual_seed(1)
    gains = [weight for weight in model.ln_final.parameters() if weight.eq(1).all()]
    assert len(gains) == 1
    with torch.no_grad():
        gains[0].copy_(0.5 + torch.rand(gains[0].shape, generator=generator))
    return model


def nonzero(result, matrix):
    """Cells whose vector is not zero, because the scores of a zero vector are all equal."""
    cells = ~result.is_zero(matrix)
    assert cells.any()
    return cells


@has_tool
def test_the_tool_gives_our_results():
    model, asked = with_gains(bridge(GPT2, "cpu")), ask(GPT2)
    ours, theirs = contestants.lens_of_texts(model, asked), contestants.tool(model, asked)
    assert torch.equal(ours.capture.tokens, asked.ids)
    assert [result.prompt_token_ids.tolist() for result in theirs] == asked.ids.tolist()

    w_in, w_out = ours.readout("W_in"), ours.readout("W_out")
    for matrix, side, found in (
        ("W_in", "input_projection", (w_in.top_ids, w_in.bottom_ids, w_in.target_rank)),
        # The tool projects `delta_i`, we project its negative. These models have no biases.
        ("W_out", "output_projection", (w_out.bottom_ids, w_out.top_ids, w_out.target_rank)),
    ):
        for prompt, result in enumerate(theirs):
            for layer in range(GPT2.n_layers):
                read = getattr(result.layer(layer), side)
                ranks = read.target_ranks(asked.target, largest=matrix == "W_in")
                cells = nonzero(ours, matrix)[-1 if matrix == "W_in" else layer, prompt]
                for expected, tensor in zip(
                    (read.top_ranking.indices, read.bottom_ranking.indices, ranks),
                    found,
                    strict=True,
                ):
                    assert torch.equal(tensor[layer, prompt][cells], expected[cells])


@hooked_only
@TINY
def test_identities_carry_vectors_to_themselves(size):
    model, asked = with_gains(hooked(size, "cpu")), ask(size)
    carrying = contestants.identities(size)
    plain, carried = (
        contestants.lens(model, asked),
        contestants.carried_lens(model, asked, carrying),
    )
    assert (plain.projection, carried.projection) == ("logit_lens", "jacobian_lens")
    for matrix in contestants.MATRICES:
        assert torch.equal(plain.readout(matrix).top_ids, carried.readout(matrix).top_ids)


@hooked_only
@TINY
def test_the_authors_code_gives_our_results(size):
    model, asked = with_gains(hooked(size, "cpu")), ask(size)
    ours, theirs = contestants.lens(model, asked), contestants.authors_way(model, asked)
    batch, positions = asked.ids.shape
    compared = 0
    for prompt, readings in enumerate(theirs):
        assert len(readings) == size.n_layers * 2 * positions
        left = iter(readings)
        for layer in range(size.n_layers):
            for matrix in ("W_in", "W_out"):
                readout = ours.readout(matrix)
                top, bottom = readout.top_ids, readout.bottom_ids
                if matrix == "W_out":  # the raw delta_i
                    top, bottom = bottom, top
                for position in range(positions):
                    at, read = (layer, prompt, position), next(left)
                    if ours.capture[matrix, layer].spanning_set[prompt, position].eq(0).all():
                        continue
                    compared += 1
                    assert read.top_ids.tolist() == top[at].tolist()
                    assert read.bottom_ids.tolist() == bottom[at].tolist()
                    if matrix == "W_in":
                        assert read.target_rank == readout.target_rank[at]
                    else:  # from the other end
                        assert read.target_rank + readout.target_rank[at] == size.d_vocab - 1
    # In the last layer only the last position's `delta_i` is not zero.
    assert compared == batch * positions * (2 * size.n_layers - 1) + batch


@hooked_only
@TINY
def test_the_floor_has_our_factors(size, monkeypatch):
    model, asked = hooked(size, "cpu"), ask(size)
    captured = contestants.capture(model, asked)
    differentiate, gradients = torch.autograd.grad, []

    def watched(*arguments):
        gradients.extend(differentiate(*arguments))
        return gradients

    monkeypatch.setattr(torch.autograd, "grad", watched)
    vectors = contestants.passes(model, asked)
    layers = range(size.n_layers)
    spanning = [
        factor
        for layer in layers
        for factor in (captured["W_in", layer].inputs, captured["W_out", layer].vjps)
    ]
    vjps = [captured[name, layer].vjps for layer in layers for name in ("W_in", "W_out")]
    pairs = [*zip(vectors, torch.stack(spanning).flatten(0, -2), strict=True)]
    for found, wanted in [*pairs, *zip(gradients, vjps, strict=True)]:
        # The rounding error of float32 is 6e-8, and about a hundred numbers are summed.
        assert wanted.norm() == found.norm() == 0 or relative_error(found, wanted) < 1e-5


@hooked_only
@TINY
def test_our_two_phases_give_our_results(size):
    model, asked = hooked(size, "cpu"), ask(size)
    whole = contestants.lens(model, asked)
    parts = contestants.reading(model, *contestants.vectors_of(contestants.capture(model, asked)))
    expected = [whole.readout(matrix) for matrix in ("W_in", "W_out")]
    for name in ("top_ids", "bottom_ids", "target_rank"):
        assert torch.equal(
            getattr(parts, name), torch.cat([getattr(readout, name) for readout in expected])
        )


@hooked_only
@TINY
def test_the_floors_product_is_of_all_spanning_vectors(size, monkeypatch):
    model, asked = hooked(size, "cpu"), ask(size)
    vectors = contestants.passes(model, asked)
    assert len(vectors) == 2 * size.n_layers * asked.ids.numel()
    expected = 2 * vectors.numel() * size.d_vocab
    for piece in (contestants.PIECE_BYTES, 4 * size.d_vocab * 5, 1):
        monkeypatch.setattr(contestants, "PIECE_BYTES", piece)
        for product in (contestants.product, contestants.turned_product):
            with FlopCounterMode(display=False) as counted:
                product(vectors, model.W_U)
            assert counted.get_total_flops() == expected


@hooked_only
def test_contestants_leave_the_model_unchanged():
    model, asked = hooked(GPT2, "cpu"), ask(GPT2)
    for contestant in (contestants.floor, contestants.authors_way, contestants.plain_forward):
        contestant(model, asked)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(parameter.requires_grad for parameter in model.parameters())
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._backward_hooks


# --------------------------------------------------------------------------------------- estimates


@hooked_only
@TINY
@pytest.mark.parametrize("positions", [7, 40])
def test_the_estimate_of_the_floors_operations(size, positions):
    counted, estimated = [], []
    for deep in (size, replace(size, n_layers=size.n_layers + 1)):
        model, asked = hooked(deep, "cpu"), ask(deep, positions=positions)
        with FlopCounterMode(display=False) as counter:
            contestants.floor(model, asked)
        counted.append(counter.get_total_flops())
        estimated.append(floor_flops(deep, *asked.ids.shape))
    layer = counted[1] - counted[0]
    assert estimated[1] - estimated[0] == layer
    assert counted[0] <= estimated[0] < counted[0] + layer


@hooked_only
@TINY
@pytest.mark.parametrize("positions", [50, 200])
def test_the_estimate_of_the_floors_memory(size, positions):
    model, asked = hooked(size, "cpu"), ask(size, positions=positions)
    kept = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    # Logits, their gradient and a copy exist when the backward pass begins.
    logits = 3 * asked.ids.numel() * size.d_vocab * 4

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        contestants.passes(model, asked)
    measured = sum(kept.values()) + logits
    assert measured / 2 < floor_bytes(size, *asked.ids.shape, itemsize=4) < 2 * measured


def test_cells_with_a_slow_floor_are_skipped():
    # One layer, one head, widths and vocabulary of 1, and one prompt of one token. Products with
    # weights: 4 + 2 + 1 in the forward pass, and the same in the backward pass; of attention: 2 in
    # the forward pass and 4 in the backward pass; of the spanning vectors: 2. 44 operations.
    size = Size("smallest", 1, 1, 1, 1, 1)
    assert floor_flops(size, 1, 1) == 44
    limits = Limits(seconds=2.0, memory=10**9, speed={"float32": 22.0, "bfloat16": 21.0})
    assert limits.floor_seconds(size, 1, 1, "float32") == 2.0
    assert limits.reason_to_skip(size, 1, 1, "float32") is None
    reason = limits.reason_to_skip(size, 1, 1, "bfloat16")
    assert reason == "one run of the floor would take about 2 s, and the limit is 2 s (--limit)"
    # A second prompt doubles it.
    assert floor_flops(size, 2, 1) == 88


def test_cells_that_do_not_fit_into_memory_are_skipped():
    limits = Limits(seconds=math.inf, memory=20 * 10**9, speed=UNLIMITED.speed)
    assert limits.reason_to_skip(SMALL, 128, 50, "float32") is None
    reason = limits.reason_to_skip(SMALL, 128, 500, "float32")
    assert reason is not None
    assert reason.startswith("needs about ")
    assert reason.endswith(" GB, and 20 GB are available")


# ------------------------------------------------------------------------------------------ timing


class Clock:
    """A clock that only contestants advance."""

    def __init__(self):
        self.now = 0.0
        self.turns = []

    def contestant(self, name, *seconds):
        left = iter(seconds)

        def run():
            self.turns.append(name)
            self.now += next(left)

        return run

    def interleave(self, effort, **seconds):
        runs = {name: self.contestant(name, *values) for name, values in seconds.items()}
        return interleave(runs, effort, clock=lambda: self.now)


def test_contestants_alternate_and_the_first_round_is_a_warm_up():
    clock = Clock()
    timings = clock.interleave(Effort(3, seconds=100), a=[9, 1, 2, 3], b=[9, 2, 2, 2])
    assert clock.turns == [*"ab", *"ba", *"ab", *"ba"]
    assert timings.seconds == {"a": [1, 2, 3], "b": [2, 2, 2]}
    assert timings.rounds == 3


@pytest.mark.parametrize(
    ("effort", "counted"),
    [
        (Effort(1, seconds=1000), [11]),  # the given number, after a warm-up
        (Effort(5, seconds=45), [11, 12, 13]),  # another round would exceed the time
        (Effort(5, seconds=44), [11, 12]),
        (Effort(5, seconds=20), [11]),  # enough for a warm-up and one counted round
        (Effort(5, seconds=19), [10]),
        (Effort(5, seconds=5), [10]),
        (Effort(5, seconds=5, at_least=3), [10, 11, 12]),
        (Effort(5, seconds=40, at_least=3), [11, 12, 13]),
    ],
)
def test_the_number_of_slow_rounds(effort, counted):
    timings = Clock().interleave(effort, a=[10, 11, 12, 13, 14, 15, 16])
    assert timings.seconds["a"] == counted


def test_ratios_on_a_machine_that_slows_down():
    timings = Timings({"a": [1.0, 10.0, 3.0], "b": [2.0, 20.0, 6.0], "c": [1.0, 10.0, 3.0]})
    assert timings.ratio(["b"], ["a"]) == 2
    assert timings.ratio(["b"], ["a", "c"]) == 1
    assert timings.median("b") == 6
    assert timings.median("a", "c") == 6


def test_a_ratio_is_the_median_of_ratios():
    timings = Timings({"a": [1.0, 2.0, 3.0], "b": [3.0, 1.0, 9.0]})
    assert timings.ratio(["b"], ["a"]) == 3
    assert timings.median("b") / timings.median("a") == 1.5


def test_a_contestant_that_runs_out_of_memory():
    def run():
        raise torch.OutOfMemoryError("CUDA out of memory")

    frozen = gc.get_freeze_count()
    with pytest.raises(OutOfMemory, match="b ran out of the device's memory"):
        interleave({"a": lambda: None, "b": run}, Effort(1, 1.0))
    assert gc.isenabled()
    assert abs(gc.get_freeze_count() - frozen) < 100  # frozen objects may be freed


def test_the_slope_is_the_exponent():
    assert figures.log_slope({n: 3 * n**1.25 for n in (1, 8, 32, 128)}) == pytest.approx(1.25)
    assert figures.log_slope(dict.fromkeys((3, 6, 12), 0.5)) == pytest.approx(0)


# ---------------------------------------------------------------------------------- phases, memory


def test_operations_are_sorted_into_phases():
    node = "autograd::engine::evaluate_function: MmBackward0"
    one_pass = [
        ("aten::index", 0.25),
        ("benchmarks: forward", 2.0),
        ("aten::mm", 1.0),  # logits
        (node, 3.0),
        (node, 1.0),
        ("aten::matmul", 8.0),
        ("aten::topk", 0.5),
    ]
    # Only the mark of the model shows where the second forward pass begins.
    passes = [*one_pass, *one_pass[1:]]
    steps = [Step(name, float(at), seconds) for at, (name, seconds) in enumerate(passes)]
    assert by_phase(reversed(steps), seconds=35.0) == {
        "forward": 6.25,
        "backward": 8.0,
        "product": 16.0,
        "top, bottom, ranks": 1.0,
        "everything else": 3.75,
    }


@hooked_only
def test_all_phases_of_our_pipeline():
    model = hooked(GPT2, "cpu")
    run = partial(contestants.lens, model, ask(GPT2))
    run()
    found = phases(run, model, "cpu")
    assert tuple(found) == PHASES
    assert all(seconds > 0 for seconds in found.values())
    assert "forward" not in vars(model)


@hooked_only
def test_phases_of_several_passes():
    # Wide MLPs and a small vocabulary: without marks, all forward passes but the first would count
    # as readout.
    size = replace(GPT2, d_mlp=2048, d_vocab=20)
    model, asked = hooked(size, "cpu"), ask(size, batch=4, positions=50)

    def run():
        for prompt in asked.ids:
            contestants.lens(model, replace(asked, ids=prompt[None]))

    run()
    found = phases(run, model, "cpu")
    assert found["forward"] > found["product"] + found["top, bottom, ranks"]


_PEAK = """
import torch
from benchmarks import memory

size = 3 * 2**24  # above the 32 MiB up to which the C library keeps freed memory

def run():
    torch.ones(size, dtype=torch.uint8)
    return torch.ones(size, dtype=torch.uint8)

torch.ones(4 * size, dtype=torch.uint8)  # an earlier and higher peak
# What a run gives back is taken again.
print(*(memory.extra_peak(run, "cpu") - size for _ in range(2)))
"""


@reads_peaks
def test_the_peak_of_a_run():
    """In a separate process, because resident memory is that of the whole process."""
    root = Path(memory.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", _PEAK], cwd=root, capture_output=True, text=True, check=True
    )
    beyond = list(map(int, done.stdout.split()))
    # One block at a time, and 2 MiB for Python.
    assert len(beyond) == 2
    assert max(map(abs, beyond)) < 2 * 2**20


@reads_peaks
def test_the_peak_includes_reused_memory():
    # Small blocks are on the heap, which the process keeps when they are freed; the last block
    # keeps its end in use.
    size = 60_000

    def run():
        return [bytearray(size) for _ in range(1000)]

    last = run()[-1]
    assert memory.extra_peak(run, "cpu") > 900 * size
    del last


@reads_peaks
@hooked_only
def test_peaks_of_a_contestant_and_of_a_plain_forward():
    # The logits are the largest tensor: [8, 50, 8000] in float32 are 13 MB.
    size = replace(GPT2, d_vocab=8000)
    logits = 8 * 50 * 8000 * 4
    peaks = memory.measure_here(memory.Case("floor", "HookedTransformer", size, 8, 50, "cpu"))
    assert logits < peaks.forward < 2 * logits
    # Logits and their gradient, or later the scores of all 2400 vectors.
    assert peaks.contestant > 6 * logits


@pytest.mark.slow
@reads_peaks
@hooked_only
def test_memory_of_a_contestant_in_its_own_process():
    for name in memory.CONTESTANTS:
        on_bridge = name in ("tool", "ours, of texts")
        if on_bridge and contestants.why_no_tool(GPT2) is not None:
            continue
        model = "TransformerBridge" if on_bridge else "HookedTransformer"
        assert memory.measure(memory.Case(name, model, GPT2, 1, 10, "cpu")).contestant > 0


# ----------------------------------------------------------------------------------------- figures


@pytest.fixture
def bench():
    return figures.Bench("cpu", [GPT2, GATED], rounds=1, limits=UNLIMITED, main=GPT2)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The output folder of the GPU check, run with tiny models on the CPU."""
    folder = tmp_path_factory.mktemp("dry-run")
    python, option, module, *arguments = gpu_check.measurements(600, folder, dry_run=True)
    assert (python, option, module) == (sys.executable, "-m", "benchmarks")
    with type_checks_off():
        command.main(arguments)
    return folder


@pytest.fixture(scope="module")
def measured(dry_run):
    """The rows of the dry run, by figure."""
    return read_results(dry_run)["cpu"]


@hooked_only
def test_a_dry_run_measures_every_figure(measured):
    assert set(figures.FIGURES) <= set(measured)
    assert tuple(measured)[-len(figures.FIGURES) :] == command.GPU.order
    skipped = {
        row["skipped"] for name in figures.FIGURES for row in measured[name] if "skipped" in row
    }
    reasons = {contestants.why_no_tool(shrunk(size)) for size in SIZES.values()}
    assert skipped <= reasons | {memory.why_not_measured("cpu")}


@hooked_only
def test_the_grid_has_ratios_for_every_size_and_dtype(measured):
    cells = [(row["size"], row["dtype"], row["batch"]) for row in measured["grid"]]
    names = ("gpt2-xl", "llama-1b", "gpt2-small")
    assert cells == [(name, dtype, n) for name in names for dtype in DTYPES for n in (1, 32)]
    for row in measured["grid"]:
        seconds = row["seconds"]
        assert row["whole"] == pytest.approx(seconds["ours"] / seconds["floor"])
        assert seconds["floor"] == pytest.approx(seconds["passes"] + seconds["product"])
        assert row["capture"] == pytest.approx(seconds["capture"] / seconds["passes"])
        assert row["reading"] == pytest.approx(seconds["reading"] / seconds["product"])


@hooked_only
def test_peers_are_compared_by_prompt(measured):
    rows = {(row["size"], row["dtype"], row["peer"]): row for row in measured["peers"]}
    sizes = ("gpt2-xl", "llama-1b", "gpt2-small")
    peers = ("tool", "authors' way")
    assert set(rows) == {(s, d, p) for s in sizes for d in DTYPES for p in peers}
    for (size, _, peer), row in rows.items():
        reason = contestants.why_no_tool(SIZES[size])
        if peer == "tool" and reason is not None:
            assert row["skipped"] == reason
            continue
        seconds = row["seconds"]
        assert row["faster"] == pytest.approx(seconds["peer"] / seconds["ours"])
        assert row["faster_in_batch"] == pytest.approx(seconds["peer"] / (seconds["batch"] / 32))


@hooked_only
def test_the_other_figures_have_numbers(measured):
    for row in measured["scaling"]:
        points = {int(size): seconds for size, seconds in row["seconds"].items()}
        assert row["slope"] == pytest.approx(figures.log_slope(points))
    [rank] = measured["rank"]
    assert rank["shape"] == [96, 48]
    assert rank["ranks"]["ours"] == rank["ranks"]["dense"]
    assert rank["faster"] == pytest.approx(rank["seconds"]["dense"] / rank["seconds"]["ours"])
    for row, batch in zip(measured["lenses"], (1, 32), strict=True):
        assert row["batch"] == batch
        seconds = row["seconds"]
        assert row["slower"] == pytest.approx(seconds["both"] / seconds["one"])
        assert row["carried_slower"] == pytest.approx(seconds["carried"] / seconds["one"])
    assert [row["vectors"] for row in measured["orders"]] == [40, 40 * 32]
    assert [set(row["seconds"]) for row in measured["phases"]] == [set(PHASES)] * 2
    if memory.why_not_measured("cpu") is None:
        found = {row["contestant"] for row in measured["memory"] if "bytes" in row}
        assert found >= {"ours", "authors' way", "floor"}


@hooked_only
def test_a_dry_run_does_not_change_the_documentation(dry_run, measured):
    assert (dry_run / "benchmarks.md").read_text() == report.render({"cpu": measured})
    assert "--dry-run" in measured["command"]
    assert "--dry-run" not in (command.DOCS / "benchmarks.md").read_text()


def test_reasons_for_skipped_cells_of_the_grid(bench):
    limit = floor_flops(GPT2, 1, 50)
    bench = replace(bench, limits=replace(UNLIMITED, seconds=float(limit)))
    cells = list(figures.grid(bench))
    assert len(cells) == 2 * len(DTYPES) * len(BATCHES) * len(POSITIONS)
    for cell in cells:
        size = {size.name: size for size in (GPT2, GATED)}[cell.about["size"]]
        batch, positions = cell.about["batch"], cell.about["positions"]
        fits = floor_flops(size, batch, positions) <= limit
        # Goals depend on these cells, so they are never skipped.
        is_goal = (size, cell.about["dtype"], positions) == (GPT2, "float32", 10)
        assert (cell.skipped is None) == (fits or (is_goal and batch in (1, 32)))
        if cell.skipped is not None:
            why, about, rest = re.split(r"(?<=about )(\S+)", cell.skipped)
            assert why == "one run of the floor would take about "
            # With one significant digit.
            assert float(about) == pytest.approx(floor_flops(size, batch, positions), rel=1 / 3)
            assert rest == f" s, and the limit is {limit:g} s (--limit)"


def test_scaling_uses_the_layers_that_fit(bench):
    deep = {cell.about["along"]: cell.about for cell in figures.scaling(bench)}
    assert set(deep) == {"prompts", "layers", "positions"}
    assert deep["prompts"]["layers"] == deep["positions"]["layers"] == [12]
    assert deep["layers"]["layers"] == [3, 6, 12]
    six = float(floor_flops(replace(GPT2, n_layers=6), 128, 50))
    for limit, layers in ((six, 6), (1.0, 3)):
        short = replace(bench, limits=replace(UNLIMITED, seconds=limit))
        assert next(figures.scaling(short)).about["layers"] == [layers]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_rows_after_the_deadline_are_skipped(bench, name, monkeypatch):
    monkeypatch.setattr(figures, "hooked", pytest.fail)
    monkeypatch.setattr(figures, "bridge", pytest.fail)
    late = replace(bench, until=time.monotonic() - 1, peaks=pytest.fail)
    rows = list(figures.measure(late, name))
    assert rows
    assert any("reached its time limit" in row["skipped"] for row in rows)
    assert all(row["skipped"] for row in rows)


def test_no_round_starts_after_the_deadline(bench):
    late = replace(bench, rounds=5, until=time.monotonic())
    assert late.interleave({"a": lambda: None}).rounds == 1


@hooked_only
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotImplementedError("no bfloat16\nhere"), "NotImplementedError: no bfloat16"),
        (torch.OutOfMemoryError("CUDA out of memory"), "ran out of the device's memory"),
    ],
)
def test_a_peer_with_an_error_is_skipped(bench, monkeypatch, error, reason):
    def fails(model, question):
        raise error

    monkeypatch.setattr(contestants, "authors_way", fails)
    bench = replace(bench, peer_sizes=(GATED,))
    tool, authors = figures.measure(bench, "peers")
    assert tool["skipped"] == contestants.why_no_tool(GATED)
    assert reason in authors["skipped"]


def test_peak_memory_of_all_contestants(bench, monkeypatch):
    cases = []

    def measure(case):
        cases.append(case)
        if case.contestant == "floor":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return memory.Peaks(contestant=3, forward=2)

    monkeypatch.setattr(memory, "why_not_measured", lambda device: None)
    monkeypatch.setattr(contestants, "why_no_tool", lambda size: "no tool")
    rows = list(figures.measure(replace(bench, peaks=measure), "memory"))
    assert {row["contestant"] for row in rows} == set(memory.CONTESTANTS)
    for row in rows:
        if row["model"] == "TransformerBridge":
            assert row["skipped"] == "no tool"
        elif row["contestant"] == "floor":
            assert "memory" in row["skipped"]
        else:
            assert row["bytes"] == {"contestant": 3, "forward": 2}
    assert {case.size.d_vocab for case in cases} == {GPT2.d_vocab, 2**18}
    assert all(case.model == "HookedTransformer" for case in cases)


# ---------------------------------------------------------------------------------- goals and page


def results(**changed):
    """A small results file with, among others, two cells of the grid, one of them not measured."""
    cell = {"size": "gpt2-small", "dtype": "float32", "positions": 10}
    seconds = {"ours": 1.2, "floor": 1.0, "passes": 0.4, "product": 0.6}
    peer = {"size": "gpt2-small", "dtype": "float32", "positions": 10, "batch": 32}
    peaks = {"model": "HookedTransformer", "layers": 12, "batch": 32, "positions": 10}
    on_bridge = {"model": "TransformerBridge", "layers": 12, "batch": 1, "positions": 10}
    fixed = {"layers": [12], "prompts": [8], "positions": [50], "rounds": 1}
    return {
        "date": "2025-01-02 03:04 UTC",
        "command": "python -m benchmarks --quick",
        "machine": {"processor": "abacus", "cores": "2"},
        "versions": {"torch": "2.13.0"},
        "grid": [
            cell
            | {"batch": 1, "rounds": 5, "seconds": seconds}
            | {"whole": 1.2, "capture": 1.1, "reading": 1.25},
            cell | {"batch": 32, "skipped": "the machine was on fire"},
        ],
        "peers": [
            peer | {"peer": "tool", "skipped": "no tool here"},
            peer
            | {"peer": "authors' way", "rounds": 3, "faster": 5.5, "faster_in_batch": 24.9}
            | {"seconds": {"ours": 0.4, "peer": 2.2, "batch": 3.2}},
        ],
        "lenses": [
            {"batch": 32, "rounds": 5, "seconds": {"one": 3.2, "both": 3.84, "carried": 3.3}}
            | {"slower": 1.21, "carried_slower": 1.03}
        ],
        "rank": [
            {"shape": [3072, 768], "ranks": {"ours": 10, "dense": 10}, "rounds": 5}
            | {"seconds": {"ours": 0.0005, "dense": 0.15}, "faster": 300.0}
        ],
        "orders": [{"batch": 1, "vectors": 240, "turned_faster": 1.3}],
        "scaling": [
            fixed | {"along": "prompts", "slope": 1.02, "seconds": {"1": 0.5, "8": 4.2}},
            fixed | {"along": "layers", "slope": 1.2, "seconds": {"3": 1.0, "6": 2.3}},
            fixed | {"along": "positions", "skipped": "no time"},
        ],
        "memory": [
            peaks
            | {"contestant": "ours", "d_vocab": 50257}
            | {"bytes": {"contestant": 450_000_000, "forward": 100_000_000}},
            peaks
            | {"contestant": "ours", "d_vocab": 2**18}
            | {"bytes": {"contestant": 600_000_000, "forward": 400_000_000}},
            on_bridge
            | {"contestant": "tool", "d_vocab": 50257}
            | {"bytes": {"contestant": 500_000_000, "forward": 1}},
            on_bridge
            | {"contestant": "ours, of texts", "d_vocab": 50257}
            | {"bytes": {"contestant": 200_000_000, "forward": 1}},
        ],
        "phases": [
            {"batch": 1, "positions": 10}
            | {"seconds": dict(zip(PHASES, (0.1, 0.2, 0.4, 0.2, 0.1), strict=True))}
        ],
    } | changed


def test_goals():
    judged = {}
    for goal in GOALS:
        try:
            value = goal.measure(results())
        except NotMeasured as error:
            judged[goal.what] = str(error)
        else:
            judged[goal.what] = (value, goal.is_reached(value))
    assert list(judged.values()) == [
        "no tool here",
        (0.4, True),
        "no tool here",
        (24.9, False),
        (1.2, True),
        "the machine was on fire",
        "the machine was on fire",
        (1.03, True),
        (300.0, True),
        (1.02, True),
        (1.2, False),
        "no time",
        (350.0, False),
        (-150.0, True),
    ]


def test_a_goal_without_a_row():
    with pytest.raises(NotMeasured, match="no grid of size gpt2-small, dtype float32, batch 1"):
        next(goal for goal in GOALS if "floor" in goal.what).measure(results(grid=[]))


def cells_with(page, text):
    """Cells of the only line of the page that contains the text."""
    [line] = [line for line in page.splitlines() if text in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_has_numbers_and_reasons():
    page = report.render({"cpu": results()})
    number = page.partition("the machine was on fire")[0].split()[-1].rstrip(".")
    goal = cells_with(page, "times as fast as the authors' way")
    assert goal[-4:] == ["at least 25", "24.9", "**no**", f"[{number}]"]
    assert cells_with(page, "| authors' way | 400")[3:] == ["400", "100", "2,200", "5.5", "24.9"]
    assert cells_with(page, "| gpt2-small | float32 | 1 |")[4:] == [
        "1.2",
        "1.1",
        "1.25",
        "1,200",
        "5",
    ]
    assert cells_with(page, "| gpt2-small | float32 | 32 | 10 |")[4] == f"[{number}]"
    assert cells_with(page, "| ours | HookedTransformer | 50257")[-3:] == ["450", "100", "350"]
    assert cells_with(page, "ms per unit | 333") == ["ms per unit", "333", "383"]


def test_the_value_of_the_floor_for_a_goal():
    one, authors = results()["grid"][0], results()["peers"][1]
    batch = one | {"batch": 32, "seconds": one["seconds"] | {"floor": 6.4}}
    page = report.render({"cpu": results(grid=[one, batch], peers=[authors])})
    # 2.2 s per prompt, compared with 6.4 s for 32 prompts.
    assert cells_with(page, "at least 25")[-1] == "11"


def test_a_second_machine_adds_columns(tmp_path):
    write_results(tmp_path, "cpu", results())
    cell, _ = results()["grid"]
    large = cell | {"size": "gpt2-xl", "dtype": "bfloat16", "batch": 32, "whole": 1.05}
    elsewhere = results(grid=[large, large | {"batch": 1, "skipped": "time was up"}], date="later")
    # An interrupted run has some of the figures.
    del elsewhere["scaling"], elsewhere["memory"], elsewhere["peers"]
    write_results(tmp_path, "cuda", elsewhere)
    page = report.write_page(tmp_path).read_text()
    assert json.loads((tmp_path / "benchmarks" / "cpu.json").read_text()) == results()
    columns = ["whole", "capture", "reading", "ours", "rounds"]
    head = [f"{kind}<br>{name}" for kind in ("cpu", "cuda") for name in columns]
    assert cells_with(page, "| size | dtype | batch |")[4:] == head
    mine = cells_with(page, "| gpt2-small | float32 | 1 |")
    assert mine[4:] == ["1.2", "1.1", "1.25", "1,200", "5", "·", "", "", "", ""]
    theirs = cells_with(page, "| gpt2-xl | bfloat16 | 32 |")
    assert theirs[4:] == ["·", "", "", "", "", "1.05", "1.1", "1.25", "37.5", "5"]
    assert "time was up" in page


def test_the_page_without_missing_numbers():
    missing = results()
    one, authors = missing["grid"][0], missing["peers"][1]
    prompts, layers, _ = missing["scaling"]
    whole = results(
        grid=[one, one | {"batch": 32}],
        peers=[authors, authors | {"peer": "tool"}],
        scaling=[prompts, layers, layers | {"along": "positions"}],
    )
    page = report.render({"cpu": whole})
    assert page.endswith("## Missing numbers\n\nEverything was measured.\n")
    assert "[1]" not in page
    assert "[1]" in report.render({"cpu": missing})


def test_all_rows_of_a_table_have_the_same_number_of_cells():
    page = report.render({"cpu": results(), "cuda": results(date="later")})
    width = None
    for line in page.splitlines():
        if not line.startswith("|"):
            width = None
            continue
        width = width or line.count("|")
        assert line.count("|") == width, line


def test_the_committed_page_matches_the_committed_results():
    machines = read_results(command.DOCS)
    if not machines:
        pytest.skip("no results are committed; `make bench` writes them")
    assert (command.DOCS / "benchmarks.md").read_text() == report.render(machines)


# ----------------------------------------------------------------------------------------- command


@pytest.fixture
def benches(monkeypatch):
    """The runs of the command, with the figures of `results`."""
    seen = []

    def measure(bench, name):
        seen.append(bench)
        yield from results()[name]

    monkeypatch.setattr(figures, "measure", measure)
    monkeypatch.setattr(estimates, "product_speed", lambda dtype, device: 1.0)
    return seen


@hooked_only
def test_the_command_writes_results_and_page(tmp_path, benches):
    options = ["--devices", "cpu", "--out", str(tmp_path)]
    command.main(["--quick", "--limit", "7.5", *options])
    quick = benches[0]
    assert (list(quick.sizes), quick.rounds) == ([SMALL], command.QUICK.rounds)
    assert (list(quick.peer_sizes), quick.limits.seconds) == ([SMALL], 7.5)
    kept = json.loads((tmp_path / "benchmarks" / "cpu.json").read_text())
    assert {name: kept[name] for name in figures.FIGURES} == {
        name: results()[name] for name in figures.FIGURES
    }
    assert kept["command"].startswith("python -m benchmarks --quick --limit 7.5")
    assert {"python", "torch", "transformer-lens", "backward-lens-tl"} <= set(kept["versions"])
    assert {"processor", "cores", "memory", "load before"} <= set(kept["machine"])
    assert (tmp_path / "benchmarks.md").read_text() == report.render({"cpu": kept})

    benches.clear()
    command.main(["--sizes", "gpt2-xl", "llama-1b", "--rounds", "9", *options])
    assert [size.name for size in benches[0].sizes] == ["gpt2-xl", "llama-1b"]
    assert (benches[0].rounds, benches[0].limits.seconds) == (9, command.FULL.limit)

    benches.clear()
    command.main(["--gpu", "--seconds", "300", *options])
    assert list(benches[0].peer_sizes) == [SIZES["gpt2-xl"], LLAMA, SMALL]
    assert list(benches[0].peer_dtypes) == list(DTYPES)
    assert 290 < benches[0].seconds_left <= 300


@hooked_only
def test_remeasuring_some_figures_keeps_the_others(tmp_path, benches, monkeypatch):
    options = ["--devices", "cpu", "--out", str(tmp_path)]
    command.main(options)
    kept = json.loads((tmp_path / "benchmarks" / "cpu.json").read_text())
    monkeypatch.setattr(figures, "measure", lambda bench, name: iter(()))
    command.main(["--only", "orders", "rank", *options])
    again = json.loads((tmp_path / "benchmarks" / "cpu.json").read_text())
    assert again.pop("again")[0]["figures"] == ["orders", "rank"]
    assert again == kept | {"orders": [], "rank": []}
    assert "  - repeated orders, rank: " in (tmp_path / "benchmarks.md").read_text()


@hooked_only
def test_a_failing_figure_does_not_stop_the_others(tmp_path, benches, monkeypatch):
    def measure(bench, name):
        first, *others = results()[name]
        yield first
        if name == "grid":
            raise ZeroDivisionError
        yield from others

    monkeypatch.setattr(figures, "measure", measure)
    with pytest.raises(SystemExit) as ended:
        command.main(["--devices", "cpu", "--out", str(tmp_path)])
    assert ended.value.code == 1
    kept = json.loads((tmp_path / "benchmarks" / "cpu.json").read_text())
    assert kept["grid"] == results()["grid"][:1]
    assert kept["memory"] == results()["memory"]


def test_the_page_from_existing_results(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "measure", pytest.fail)
    write_results(tmp_path, "cuda", results())
    command.main(["--page", "--out", str(tmp_path)])
    assert (tmp_path / "benchmarks.md").read_text() == report.render({"cuda": results()})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "gpt3"], "choose from gpt2-small, gpt2-medium, gpt2-xl, llama-1b"),
        (["--rounds", "0"], "0 is not allowed; pass 1 or more"),
        (["--limit", "-3"], "-3 is not allowed; pass a number above 0"),
        (["--seconds", "0"], "0 is not allowed; pass a number above 0"),
        (["--dry-run", "--devices", "cpu"], "pass --out with a folder other than docs"),
        (["--limit", "nan"], "nan is not allowed; pass a number above 0"),
        (["--devices", "abacus"], "choose from cpu, cuda"),
        (
            ["--only", "speed"],
            "choose from peers, grid, lenses, rank, orders, scaling, memory, phases",
        ),
        pytest.param(
            ["--only", "rank", "--devices", "cpu", "--out", "nowhere"],
            "--only keeps the other figures of",
            marks=hooked_only,
        ),
        pytest.param(
            ["--devices", "cuda"],
            "torch sees no cuda here; allowed: cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA"),
        ),
    ],
)
def test_errors_of_the_command(options, message, capsys, monkeypatch):
    monkeypatch.setattr(figures, "measure", pytest.fail)
    with pytest.raises(SystemExit):
        command.main(options)
    # Some versions of Python quote the choices.
    assert message in capsys.readouterr().err.replace("'", "")


# ----------------------------------------------------------------------------------- check on a GPU


def python(code):
    return [sys.executable, "-c", code]


def is_soon_free(path, seconds=5):
    """Whether the file is unlocked within a few seconds."""
    end = time.monotonic() + seconds
    with path.open() as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    return False
                time.sleep(0.05)
            else:
                return True


def test_steps_of_the_check_end_in_time(tmp_path):
    step = partial(gpu_check.run, "step", seconds=30, variables=gpu_check.environment(tmp_path))
    assert step(python("")).problem is None
    assert step(python("raise SystemExit(3)")).problem == "FAILED with status 3"
    held = tmp_path / "held"
    # The step starts a process that would outlive it and that holds a lock while it runs.
    outliving = f"""if True:
        import fcntl, time
        with open({str(held)!r}, "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            print("begun", file=held, flush=True)
            time.sleep(60)
    """
    endless = f"""if True:
        import subprocess, time
        subprocess.Popen({python(outliving)!r})
        time.sleep(60)
    """
    start = time.monotonic()
    stopped = step(python(endless), seconds=3)
    assert stopped.problem == "FAILED: stopped after 3 s"
    assert held.read_text() == "begun\n"
    assert is_soon_free(held)
    assert time.monotonic() - start < 20
    assert step(python(""), seconds=-1.0).problem == "not started: the time limit was reached"


@pytest.mark.parametrize("dry_run", [True, False])
def test_the_check_runs_tests_and_measurements_on_the_device(
    dry_run, monkeypatch, tmp_path, capsys
):
    steps = {}

    def run(what, command, seconds, variables):
        steps[what] = (command, seconds, variables)
        return gpu_check.Ended(what, 1.0, "FAILED with status 1" if what == "tests" else None)

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "WHEELS", tmp_path)
    (tmp_path / "some-1.0-py3-none-any.whl").touch()
    with pytest.raises(SystemExit):
        gpu_check.main(["--dry-run"] if dry_run else [])
    assert list(steps) == ["wheels", "tests", "measurements"]
    assert str(tmp_path / "some-1.0-py3-none-any.whl") in steps["wheels"][0]
    device = "cpu" if dry_run else "cuda"
    assert all(variables["BACKWARD_LENS_DEVICE"] == device for _, _, variables in steps.values())
    assert steps["tests"][1] <= gpu_check.TESTS_SECONDS
    command = steps["measurements"][0]
    assert command[command.index("--devices") + 1] == device
    assert ("--dry-run" in command, "--out" in command) == (dry_run, dry_run)
    assert float(command[command.index("--seconds") + 1]) < steps["measurements"][1] <= 420
    assert "tests: FAILED with status 1 (1 s)" in capsys.readouterr().out
