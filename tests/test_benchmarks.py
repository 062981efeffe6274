"""The benchmarks time the same work for everybody, count rounds right, and report what they saw."""

from __future__ import annotations

import gc
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from models import hooked_only, relative_error
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as command
from benchmarks import contestants, estimates, figures, memory, report
from benchmarks.estimates import Limits, floor_bytes, floor_flops, product_speed
from benchmarks.goals import GOALS, NotMeasured
from benchmarks.phases import PHASES, Step, by_phase, phases
from benchmarks.sizes import SMALL, Size, bridge, hooked, question
from benchmarks.timing import Effort, OutOfMemory, Timings, interleave

GPT2 = Size("gpt2-small", 3, 48, 4, 96, 500)
LLAMA = Size("llama-1b", 2, 64, 8, 160, 700, n_key_value_heads=2)
TINY = pytest.mark.parametrize("size", [GPT2, LLAMA], ids=["gpt2", "llama"])

UNLIMITED = Limits(math.inf, 2**62, {"float32": 1.0, "bfloat16": 1.0})

reads_peaks = pytest.mark.skipif(
    memory.why_not_measured("cpu") is not None, reason=str(memory.why_not_measured("cpu"))
)
has_tool = pytest.mark.skipif(
    contestants.why_no_tool() is not None, reason=str(contestants.why_no_tool())
)


# ------------------------------------------------------------------------------------ same answers


def ask(size, batch=2, positions=7):
    return question(size, batch, positions, "cpu")


def with_gains(model):
    """A model whose final norm matters: without gains it leaves the order of scores as it is."""
    generator = torch.Generator().manual_seed(1)
    gains = [weight for weight in model.ln_final.parameters() if weight.eq(1).all()]
    assert len(gains) == 1
    with torch.no_grad():
        gains[0].copy_(0.5 + torch.rand(gains[0].shape, generator=generator))
    return model


def nonzero(result, matrix):
    """Cells whose vector is not zero: of a zero vector all scores are equal, and any are on top."""
    cells = ~result.is_zero(matrix)
    assert cells.any()
    return cells


@has_tool
def test_the_tool_gives_our_answers():
    model, asked = with_gains(bridge(GPT2, "cpu")), ask(GPT2)
    ours, theirs = contestants.lens_of_texts(model, asked), contestants.tool(model, asked)
    assert torch.equal(ours.gradients.tokens, asked.ids)
    assert [result.prompt_token_ids.tolist() for result in theirs] == asked.ids.tolist()

    w_in, w_out = ours.readout("W_in"), ours.readout("W_out")
    for matrix, side, found in (
        ("W_in", "input_projection", (w_in.top_ids, w_in.bottom_ids, w_in.target_rank)),
        # They project the raw `delta_i`, we its negative, and these models have no biases.
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
def test_the_authors_way_gives_our_answers(size):
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
                    if ours.gradients[matrix, layer].spanning_set[prompt, position].eq(0).all():
                        continue
                    compared += 1
                    assert read.top_ids.tolist() == top[at].tolist()
                    assert read.bottom_ids.tolist() == bottom[at].tolist()
                    if matrix == "W_in":
                        assert read.target_rank == readout.target_rank[at]
                    else:  # counted from the other end
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
        # float32 rounds at 6e-8 and some hundred numbers are added on the way.
        assert wanted.norm() == found.norm() == 0 or relative_error(found, wanted) < 1e-5


@hooked_only
@TINY
def test_our_two_parts_are_our_whole(size):
    model, asked = hooked(size, "cpu"), ask(size)
    whole = contestants.lens(model, asked)
    parts = contestants.reading(model, contestants.groups_of(contestants.capture(model, asked)))
    expected = [
        (whole.readout(matrix), layer) for matrix in ("W_in", "W_out") for layer in whole.layers
    ]
    for part, (readout, layer) in zip(parts, expected, strict=True):
        assert torch.equal(part.top_ids, readout.top_ids[layer].flatten(0, 1))
        assert torch.equal(part.bottom_ids, readout.bottom_ids[layer].flatten(0, 1))
        assert torch.equal(part.target_rank, readout.target_rank[layer].flatten())


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
def test_nobody_leaves_anything_on_the_model_for_the_next():
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
def test_the_floors_operations_are_estimated_from_above_by_less_than_a_layer(size, positions):
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
def test_the_floors_memory_is_estimated_within_a_factor_of_two(size, positions):
    model, asked = hooked(size, "cpu"), ask(size, positions=positions)
    kept = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    # Logits, their gradient and a copy are there when the backward pass begins.
    logits = 3 * asked.ids.numel() * size.d_vocab * 4

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        contestants.passes(model, asked)
    measured = sum(kept.values()) + logits
    assert measured / 2 < floor_bytes(size, *asked.ids.shape, itemsize=4) < 2 * measured


def test_a_cell_is_left_out_when_its_floor_takes_too_long():
    # One layer of width 1, one head, an MLP of width 1 and a vocabulary of 1; one prompt of one
    # token: 4 + 2 + 1 products with weights forwards and as many backwards, 2 of attention forwards
    # and 4 backwards, 2 of the spanning vectors; 22 in all, 44 operations.
    size = Size("smallest", 1, 1, 1, 1, 1)
    assert floor_flops(size, 1, 1) == 44
    limits = Limits(seconds=2.0, memory=10**9, speed={"float32": 22.0, "bfloat16": 21.0})
    assert limits.floor_seconds(size, 1, 1, "float32") == 2.0
    assert limits.reason_to_skip(size, 1, 1, "float32") is None
    reason = limits.reason_to_skip(size, 1, 1, "bfloat16")
    assert reason == "one run of the floor would take about 2 s, and the limit is 2 s (--limit)"
    # A second prompt is as much again.
    assert floor_flops(size, 2, 1) == 88


def test_a_cell_is_left_out_when_it_does_not_fit():
    limits = Limits(seconds=math.inf, memory=20 * 10**9, speed=UNLIMITED.speed)
    assert limits.reason_to_skip(SMALL, 128, 50, "float32") is None
    reason = limits.reason_to_skip(SMALL, 128, 500, "float32")
    assert reason is not None
    assert reason.startswith("needs about ")
    assert reason.endswith(" GB, and 20 GB are there")


def test_the_speed_of_a_product_is_a_speed():
    assert 1e7 < product_speed(torch.float32, "cpu") < 1e15


# ------------------------------------------------------------------------------------------ timing


class Clock:
    """A clock that only the contestants move."""

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


def test_contestants_take_turns_and_the_first_round_warms_up():
    clock = Clock()
    timings = clock.interleave(Effort(3, seconds=100), a=[9, 1, 2, 3], b=[9, 2, 2, 2])
    assert clock.turns == [*"ab", *"ba", *"ab", *"ba"]
    assert timings.seconds == {"a": [1, 2, 3], "b": [2, 2, 2]}
    assert timings.rounds == 3


@pytest.mark.parametrize(
    ("effort", "counted"),
    [
        (Effort(1, seconds=1000), [11]),  # as many as are asked for, behind a warm-up
        (Effort(5, seconds=45), [11, 12, 13]),  # another one as long as the last would go beyond
        (Effort(5, seconds=44), [11, 12]),
        (Effort(5, seconds=20), [11]),  # just enough for a warm-up and one that counts
        (Effort(5, seconds=19), [10]),
        (Effort(5, seconds=5), [10]),
        (Effort(5, seconds=5, at_least=3), [10, 11, 12]),
        (Effort(5, seconds=40, at_least=3), [11, 12, 13]),
    ],
)
def test_slow_rounds_are_fewer_and_then_the_first_one_counts(effort, counted):
    timings = Clock().interleave(effort, a=[10, 11, 12, 13, 14, 15, 16])
    assert timings.seconds["a"] == counted


def test_a_ratio_does_not_see_a_machine_that_gets_slower():
    timings = Timings({"a": [1.0, 10.0, 3.0], "b": [2.0, 20.0, 6.0], "c": [1.0, 10.0, 3.0]})
    assert timings.ratio(["b"], ["a"]) == 2
    assert timings.ratio(["b"], ["a", "c"]) == 1
    assert timings.median("b") == 6
    assert timings.median("a", "c") == 6


def test_a_ratio_is_the_median_of_ratios_and_not_the_ratio_of_medians():
    timings = Timings({"a": [1.0, 2.0, 3.0], "b": [3.0, 1.0, 9.0]})
    assert timings.ratio(["b"], ["a"]) == 3
    assert timings.median("b") / timings.median("a") == 1.5


def test_the_contestant_that_runs_out_of_memory_is_named():
    def run():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemory, match="b ran out of the device's memory"):
        interleave({"a": lambda: None, "b": run}, Effort(1, 1.0))
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_the_slope_is_the_exponent():
    assert figures.log_slope({n: 3 * n**1.25 for n in (1, 8, 32, 128)}) == pytest.approx(1.25)
    assert figures.log_slope(dict.fromkeys((3, 6, 12), 0.5)) == pytest.approx(0)


# ---------------------------------------------------------------------------------- phases, memory


def test_operations_are_sorted_into_phases():
    node = "autograd::engine::evaluate_function: MmBackward0"
    one_pass = [
        ("aten::index", 0.25),
        ("benchmarks: forward", 2.0),
        ("aten::mm", 1.0),  # the logits
        (node, 3.0),
        (node, 1.0),
        ("aten::matmul", 8.0),
        ("aten::topk", 0.5),
    ]
    # In a second pass nothing shows that the first one's reading is over before the model runs.
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
def test_every_phase_of_our_pipeline_is_seen():
    model = hooked(GPT2, "cpu")
    run = partial(contestants.lens, model, ask(GPT2))
    run()
    found = phases(run, model, "cpu")
    assert tuple(found) == PHASES
    assert all(seconds > 0 for seconds in found.values())
    assert "forward" not in vars(model)


@hooked_only
def test_more_passes_are_more_of_the_forward_pass_and_not_of_the_reading():
    # Wide MLPs and a small vocabulary: without the mark of each forward pass, all but the first
    # pass's would count as reading.
    size = replace(GPT2, d_mlp=4096, d_vocab=20)
    model, asked = hooked(size, "cpu"), ask(size, batch=8, positions=50)

    def run():
        for prompt in asked.ids:
            contestants.lens(model, replace(asked, ids=prompt[None]))

    run()
    found = phases(run, model, "cpu")
    assert found["forward"] > found["product"] + found["top, bottom, ranks"]


@reads_peaks
def test_the_peak_is_what_a_run_takes_at_once():
    size = 2**26

    def run():
        torch.ones(size, dtype=torch.uint8)
        return torch.ones(size, dtype=torch.uint8)

    torch.ones(4 * size, dtype=torch.uint8)  # an earlier and higher peak
    for _ in range(2):  # what a run gives back is taken again
        # One block at a time; 2 MiB for what Python itself takes.
        assert abs(memory.extra_peak(run, "cpu") - size) < 2 * 2**20


@reads_peaks
def test_the_peak_counts_memory_that_the_c_library_kept_back():
    # Small blocks come from the heap, which stays with the process when they are given back; the
    # last one keeps its end in use.
    size = 60_000

    def run():
        return [bytearray(size) for _ in range(1000)]

    last = run()[-1]
    assert memory.extra_peak(run, "cpu") > 900 * size
    del last


@reads_peaks
@hooked_only
def test_peaks_of_a_contestant_and_of_a_plain_forward():
    # Larger logits than anything else: [8, 50, 20000] in float32 are 32 MB.
    size = replace(GPT2, d_vocab=20000)
    logits = 8 * 50 * 20000 * 4
    peaks = memory.measure_here(memory.Case("floor", "HookedTransformer", size, 8, 50, "cpu"))
    assert logits < peaks.forward < 2 * logits
    # Logits and their gradient, or later the scores of all 2400 vectors.
    assert peaks.contestant > 6 * logits


@pytest.mark.slow
@reads_peaks
@hooked_only
def test_every_contestant_can_be_measured_in_a_process_of_its_own():
    for name in memory.CONTESTANTS:
        on_bridge = name in ("tool", "ours, of texts")
        if on_bridge and contestants.why_no_tool() is not None:
            continue
        model = "TransformerBridge" if on_bridge else "HookedTransformer"
        assert memory.measure(memory.Case(name, model, GPT2, 1, 10, "cpu")).contestant > 0


# ----------------------------------------------------------------------------------------- figures


@pytest.fixture
def bench():
    return figures.Bench("cpu", [GPT2, LLAMA], rounds=1, limits=UNLIMITED, main=GPT2)


@pytest.fixture
def quick(monkeypatch, as_for_a_user):
    """Fewer and smaller cells, and one round that counts."""
    monkeypatch.setattr(figures, "BATCHES", (1, 32))
    monkeypatch.setattr(figures, "POSITIONS", (10, 20))
    monkeypatch.setattr(figures, "SCALED_POSITIONS", (10, 20, 40))
    monkeypatch.setattr(figures, "SCALED_LENGTH", 10)
    monkeypatch.setattr(figures, "_CELL_SECONDS", 0.0)
    monkeypatch.setattr(figures, "_GOAL_SECONDS", 0.0)


@hooked_only
def test_the_grid_measures_what_fits_and_says_why_not(bench, quick):
    limit = floor_flops(GPT2, 1, 20)
    bench = replace(bench, limits=replace(UNLIMITED, seconds=float(limit)))
    rows = list(figures.grid(bench))
    assert len(rows) == 2 * 2 * 2 * 2
    for row in rows:
        size = {size.name: size for size in (GPT2, LLAMA)}[row["size"]]
        is_goal = size == GPT2 and row["dtype"] == "float32" and row["positions"] == 10
        fits = floor_flops(size, row["batch"], row["positions"]) <= limit
        assert ("skipped" in row) == (not fits and not (is_goal and row["batch"] == 32))
        if "skipped" not in row:
            seconds = row["seconds"]
            assert row["whole"] == pytest.approx(seconds["ours"] / seconds["floor"])
            assert seconds["floor"] == pytest.approx(seconds["passes"] + seconds["product"])
            assert row["capture"] == pytest.approx(seconds["capture"] / seconds["passes"])
            assert row["reading"] == pytest.approx(seconds["reading"] / seconds["product"])


@hooked_only
def test_peers_are_compared_by_prompt(bench, quick):
    rows = {row["peer"]: row for row in figures.peers(bench)}
    assert set(rows) == {"tool", "authors' way"}
    for peer, row in rows.items():
        if peer == "tool" and (reason := contestants.why_no_tool()) is not None:
            assert row["skipped"] == reason
            continue
        seconds = row["seconds"]
        assert row["faster"] == pytest.approx(seconds["peer"] / seconds["ours"])
        assert row["faster_in_batch"] == pytest.approx(seconds["peer"] / (seconds["batch"] / 32))


@hooked_only
def test_scaling_takes_the_layers_that_fit(bench, quick):
    deep = {row["along"]: row for row in figures.scaling(bench)}
    assert set(deep) == {"prompts", "layers", "positions"}
    assert deep["prompts"]["layers"] == deep["positions"]["layers"] == [12]
    assert deep["layers"]["layers"] == [3, 6, 12]
    for row in deep.values():
        points = {int(size): seconds for size, seconds in row["seconds"].items()}
        assert row["slope"] == pytest.approx(figures.log_slope(points))
    six = float(floor_flops(replace(GPT2, n_layers=6), 32, 10))
    for limit, layers in ((six, 6), (1.0, 3)):
        short = replace(bench, limits=replace(UNLIMITED, seconds=limit))
        row = next(figures.scaling(short))
        assert (row["along"], row["layers"]) == ("prompts", [layers])


@hooked_only
def test_rank_and_phases_and_orders_have_numbers(bench, quick):
    [rank] = figures.rank(bench)
    assert rank["ranks"] == {"ours": 10, "dense": 10}
    assert rank["faster"] == pytest.approx(rank["seconds"]["dense"] / rank["seconds"]["ours"])
    for row, batch in zip(figures.lenses(bench), (1, 32), strict=True):
        assert row["batch"] == batch
        assert row["slower"] == pytest.approx(row["seconds"]["both"] / row["seconds"]["one"])
    assert [row["vectors"] for row in figures.orders(bench)] == [60, 60 * 32]
    assert [set(row["seconds"]) for row in figures.where_time_goes(bench)] == [set(PHASES)] * 2


def test_every_figure_of_the_page_is_measured(bench, monkeypatch):
    rows = {name: value for name, value in results().items() if isinstance(value, list)}
    functions = {"memory": "peak_memory", "phases": "where_time_goes"}
    for name, value in rows.items():
        function = functions.get(name, name)
        monkeypatch.setattr(figures, function, lambda bench, value=value: iter(value))
    assert figures.measure(bench) == rows
    assert figures.measure(bench, ["rank"]) == {"rank": rows["rank"]}


def test_peak_memory_is_measured_of_everybody_or_there_is_a_reason(bench, monkeypatch):
    cases = []

    def measure(case):
        cases.append(case)
        if case.contestant == "floor":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return memory.Peaks(contestant=3, forward=2)

    monkeypatch.setattr(memory, "measure", measure)
    monkeypatch.setattr(memory, "why_not_measured", lambda device: None)
    monkeypatch.setattr(contestants, "why_no_tool", lambda: "no tool")
    rows = list(figures.peak_memory(bench))
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
    """A small results file: two cells of the grid, one of them not measured, and so on."""
    cell = {"size": "gpt2-small", "dtype": "float32", "positions": 10}
    seconds = {"ours": 1.2, "floor": 1.0, "passes": 0.4, "product": 0.6}
    peer = {"size": "gpt2-small", "positions": 10, "batch": 32}
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
            {"batch": 32, "rounds": 5, "seconds": {"one": 3.2, "both": 3.84}, "slower": 1.21}
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


def test_goals_are_measured_and_judged():
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
        (300.0, True),
        (1.02, True),
        (1.2, False),
        "no time",
        (350.0, False),
        (-150.0, True),
    ]


def test_a_goal_without_a_row_says_what_is_missing():
    with pytest.raises(NotMeasured, match="no grid of size gpt2-small, dtype float32, batch 1"):
        next(goal for goal in GOALS if "floor" in goal.what).measure(results(grid=[]))


def lines_with(page, text):
    return [line for line in page.splitlines() if text in line]


def test_the_page_shows_numbers_reasons_and_missed_goals():
    page = report.render({"cpu": results()})
    [skipped] = lines_with(page, "| gpt2-small | float32 | 32 |")
    [note] = lines_with(page, "the machine was on fire")
    mark = f"[{note.partition('.')[0]}]"
    assert lines_with(page, "24.9") == [
        "| a prompt of a batch of 32, times as fast as the authors' way | at least 25 | 24.9 | "
        f"**no** | {mark} |",
        "| gpt2-small | authors' way | 400 | 100 | 2,200 | 5.5 | 24.9 |",
    ]
    assert "| 1 prompt, times as long as the floor | at most 1.5 | 1.2 | yes | · |" in page
    [cell] = lines_with(page, "| gpt2-small | float32 | 1 |")
    assert cell == "| gpt2-small | float32 | 1 | 10 | 1.2 | 1.1 | 1.25 | 1,200 | 5 |"
    # A reason is numbered where it is first met, and listed at the end.
    assert skipped == f"| gpt2-small | float32 | 32 | 10 | {mark} |  |  |  |  |"
    assert f"times as long as the floor | at most 1.3 | {mark} |  |  |" in page
    assert "**cpu, layers** (8 prompts, 50 positions): slope 1.200; rounds: 1" in page
    assert "| ms per unit | 333 | 383 |" in page
    assert any(line.endswith("| 100 | 120 | 1.21 |") for line in lines_with(page, "1.21"))
    assert "| 1 | 100 (10%) | 200 (20%) | 400 (40%) | 200 (20%) | 100 (10%) |" in page
    assert "| ours | HookedTransformer | 50257 | 12 | 32 | 10 | 450 | 100 | 350 |" in page
    assert "`python -m benchmarks --quick`" in page
    assert "processor: abacus; cores: 2" in page


def test_a_goal_says_what_the_floor_would_have():
    one, authors = results()["grid"][0], results()["peers"][1]
    batch = one | {"batch": 32, "seconds": one["seconds"] | {"floor": 6.4}}
    page = report.render({"cpu": results(grid=[one, batch], peers=[authors])})
    [line] = lines_with(page, "at least 25")
    # 2.2 s a prompt against 6.4 s for 32 of them.
    assert line.endswith("| 24.9 | **no** | 11 |")


def test_a_second_machine_adds_columns_and_leaves_the_firsts(tmp_path):
    report.write_results(tmp_path, "cpu", results())
    report.write_page(tmp_path)
    grid = results()["grid"]
    elsewhere = results(grid=[grid[0] | {"whole": 1.05, "batch": 8}], date="later")
    report.write_results(tmp_path, "cuda", elsewhere)
    page = report.write_page(tmp_path).read_text()
    assert json.loads((tmp_path / "benchmarks" / "cpu.json").read_text()) == results()
    assert "| size | dtype | batch | positions | cpu<br>whole |" in page
    assert "cuda<br>whole" in page
    [mine] = lines_with(page, "| gpt2-small | float32 | 1 |")
    assert mine.endswith("| 1.2 | 1.1 | 1.25 | 1,200 | 5 | · |  |  |  |  |")
    [theirs] = lines_with(page, "| gpt2-small | float32 | 8 |")
    assert theirs.endswith("| · |  |  |  |  | 1.05 | 1.1 | 1.25 | 150 | 5 |")


def test_the_page_has_no_notes_where_everything_was_measured():
    missing = results()
    one, authors = missing["grid"][0], missing["peers"][1]
    prompts, layers, _ = missing["scaling"]
    whole = results(
        grid=[one, one | {"batch": 32}],
        peers=[authors, authors | {"peer": "tool"}],
        scaling=[prompts, layers, layers | {"along": "positions"}],
    )
    page = report.render({"cpu": whole})
    assert page.endswith("## No number\n\nEverything was measured.\n")
    assert "[1]" not in page
    assert "[1]" in report.render({"cpu": missing})


def test_every_row_of_the_page_has_as_many_cells_as_its_head():
    page = report.render({"cpu": results(), "cuda": results(date="later")})
    widths = None
    for line in page.splitlines():
        if not line.startswith("|"):
            widths = None
            continue
        widths = widths or line.count("|")
        assert line.count("|") == widths, line


def test_the_committed_page_is_made_of_the_committed_results():
    machines = report.read_results(command.DOCS)
    if not machines:
        pytest.skip("no results are committed; `make bench` writes them")
    assert (command.DOCS / "benchmarks.md").read_text() == report.render(machines)


# ----------------------------------------------------------------------------------------- command


@hooked_only
def test_the_command_writes_results_and_page(tmp_path, monkeypatch):
    benches = []

    def measure(bench, names):
        benches.append(bench)
        return {name: results()[name] for name in names}

    monkeypatch.setattr(figures, "measure", measure)
    monkeypatch.setattr(estimates, "product_speed", lambda dtype, device: 1.0)
    options = ["--devices", "cpu", "--out", str(tmp_path)]
    command.main(["--quick", "--limit", "7.5", *options])
    [quick] = benches
    assert (list(quick.sizes), quick.rounds) == ([SMALL], command.QUICK.rounds)
    assert quick.limits.seconds == 7.5
    kept = json.loads((tmp_path / "benchmarks" / "cpu.json").read_text())
    assert kept["command"].startswith("python -m benchmarks --quick --limit 7.5")
    assert {"python", "torch", "transformer-lens", "backward-lens-tl"} <= set(kept["versions"])
    assert {"processor", "cores", "memory", "load before"} <= set(kept["machine"])
    assert (tmp_path / "benchmarks.md").read_text() == report.render({"cpu": kept})

    monkeypatch.setattr(figures, "measure", lambda bench, names: {name: [] for name in names})
    command.main(["--only", "orders", "rank", *options])
    again = json.loads((tmp_path / "benchmarks" / "cpu.json").read_text())
    assert again.pop("again")[0]["figures"] == ["orders", "rank"]
    assert again == kept | {"orders": [], "rank": []}
    assert "  - again orders, rank: " in (tmp_path / "benchmarks.md").read_text()

    monkeypatch.setattr(figures, "measure", measure)
    command.main(["--sizes", "gpt2-xl", "llama-1b", "--rounds", "9", *options])
    assert [size.name for size in benches[1].sizes] == ["gpt2-xl", "llama-1b"]
    assert (benches[1].rounds, benches[1].limits.seconds) == (9, command.FULL.limit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "gpt3"], "choose from gpt2-small, gpt2-medium, gpt2-xl, llama-1b"),
        (["--rounds", "0"], "0 is not allowed; pass 1 or more"),
        (["--limit", "-3"], "-3 is not allowed; pass a number above 0"),
        (["--limit", "nan"], "nan is not allowed; pass a number above 0"),
        (["--devices", "abacus"], "choose from cpu, cuda"),
        (
            ["--only", "speed"],
            "choose from peers, grid, lenses, rank, orders, scaling, memory, phases",
        ),
        pytest.param(
            ["--only", "rank", "--devices", "cpu", "--out", "nowhere"],
            "nothing that --only could",
            marks=hooked_only,
        ),
        pytest.param(
            ["--devices", "cuda"],
            "torch sees no cuda here; allowed: cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA"),
        ),
    ],
)
def test_the_command_says_what_is_allowed(options, message, capsys, monkeypatch):
    monkeypatch.setattr(figures, "measure", pytest.fail)
    with pytest.raises(SystemExit):
        command.main(options)
    # Some versions of Python put the choices in quotes.
    assert message in capsys.readouterr().err.replace("'", "")
