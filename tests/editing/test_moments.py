"""Second moments against a loop over tokens of a Hugging Face model; resuming is exact."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import HAS_BRIDGE, NotAvailable, build_model
from edit_pairs import EITHER, Pair, pair
from models import N_CTX, build, hf_matrices, hooked_only, relative_error
from torch import Tensor

from backward_lens_tl.editing import SecondMoments, facts_moments, second_moments
from backward_lens_tl.editing.statistics import moment_collection
from backward_lens_tl.editing.statistics.moment_collection import _digest
from backward_lens_tl.errors import (
    BackwardLensError,
    EditError,
    InputError,
    ResultFileError,
    UnsupportedModelError,
)
from backward_lens_tl.models import host_of
from facts_model.moments import SEED, build_moments
from facts_model.moments import texts as training_texts

pytestmark = pytest.mark.usefixtures("as_for_a_user")

KINDS = [("gpt2", "bridge"), ("llama", "hooked"), ("opt", "bridge"), ("gemma2", "bridge")]
WORDS = ("Messi", "plays", "for", "Paris", "Rome", "is", "in", "the", "dog", "river", "of")


def texts(n: int, seed: int = 0) -> list[str]:
    """Texts of one to ten words."""
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(WORDS, k=drawn.randrange(1, 11))) for _ in range(n)]


TEXTS = texts(40)


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def each(request: pytest.FixtureRequest) -> Pair:
    return pair(*request.param)


@pytest.fixture(scope="module")
def own() -> Pair:
    return pair("gpt2", EITHER)


def collect(model: Any, some: Any = TEXTS, **settings: Any) -> SecondMoments:
    return second_moments(model, some, **{"prepend_bos": False, "progress": False} | settings)


def slowly(
    own: Pair, some: Sequence[str], layer: int, matrix: str = "W_out", front: Sequence[int] = ()
) -> tuple[Tensor, int]:
    """The sum over tokens, one text and one token at a time, by Hugging Face's model."""
    module, seen = hf_matrices(own.raw)[matrix, layer], []
    handle = module.register_forward_hook(lambda _, args, output: seen.append(args[0].detach()))
    total, n = torch.zeros((), dtype=torch.float64), 0
    for text in some:
        seen.clear()
        with torch.no_grad():
            own.raw(torch.tensor([[*front, *own.ids(text)][:N_CTX]]))
        [reads] = seen
        for x in reads.reshape(-1, reads.shape[-1]).double():
            total, n = total + torch.outer(x, x), n + 1
    handle.remove()
    return total / n, n


def same(one: SecondMoments, other: SecondMoments) -> bool:
    """Whether all fields of two statistics are equal bit for bit."""
    for each_field in fields(one):
        a, b = getattr(one, each_field.name), getattr(other, each_field.name)
        if isinstance(a, tuple) and a and isinstance(a[0], Tensor):
            if len(a) != len(b):
                return False
            for x, y in zip(a, b, strict=True):
                if x.dtype != y.dtype or not torch.equal(x, y):
                    return False
        elif a != b:
            return False
    return True


# --------------------------------------------------------------------------------------- the mean


def test_the_mean_over_tokens(each: Pair) -> None:
    found = collect(each.model)
    assert found.layers == (0, 1)
    for layer in found.layers:
        expected, n = slowly(each, TEXTS, layer)
        assert relative_error(found.of(layer), expected) < 3 * each.exact
        assert torch.equal(found.of(layer), found.of(layer).T)
        assert found.n_tokens == n
        assert found.of(layer).dtype == torch.float64
    assert found.n_texts == len(TEXTS)
    # Uncentred: the covariance differs, and so do other layers.
    assert relative_error(found.of(0), expected) > 0.1


@pytest.mark.parametrize("matrix", ["W_in", "W_out"])
def test_any_matrix_of_the_mlp(own: Pair, matrix: Any) -> None:
    found = collect(own.model, matrix=matrix, layers=-1)
    assert found.layers == (1,)
    assert found.matrix == matrix
    assert relative_error(found.of(1), slowly(own, TEXTS, 1, matrix)[0]) < 1e-10


def test_bos(own: Pair) -> None:
    found = collect(own.model, prepend_bos=True)
    front = [own.model.tokenizer.bos_token_id]
    expected, n = slowly(own, TEXTS, 1, front=front)
    assert found.n_tokens == n == collect(own.model).n_tokens + len(TEXTS)
    assert relative_error(found.of(1), expected) < 1e-10
    default = collect(own.model, prepend_bos=None)
    assert (default.n_tokens == n) is bool(own.model.cfg.default_prepend_bos)


def test_batches_and_padding_do_not_matter(own: Pair) -> None:
    """Mixed, single or sorted lengths: the mean is over tokens without padding."""
    found = collect(own.model)
    for order in (sorted(TEXTS, key=len), sorted(TEXTS, key=len, reverse=True)):
        other = collect(own.model, order)
        assert other.n_tokens == found.n_tokens
        assert relative_error(other.of(1), found.of(1)) < 1e-12
        assert other.texts != found.texts
    longest = max(TEXTS, key=len)
    assert relative_error(collect(own.model, [longest]).of(1), found.of(1)) > 0.01
    one = collect(own.model, ["Rome is in Rome"])
    two = collect(own.model, ["Rome is in Rome", "Messi"])
    tokens = [one.n_tokens, len(own.ids("Messi"))]
    alone = collect(own.model, ["Messi"])
    weighted = (tokens[0] * one.of(1) + tokens[1] * alone.of(1)) / sum(tokens)
    assert relative_error(two.of(1), weighted) < 1e-12


def test_any_iterator(own: Pair) -> None:
    expected = collect(own.model)
    assert same(collect(own.model, iter(TEXTS)), expected)
    assert same(collect(own.model, (text for text in TEXTS)), expected)
    assert same(collect(own.model, tuple(TEXTS)), expected)
    assert same(
        collect(own.model, dict.fromkeys(TEXTS)), collect(own.model, list(dict.fromkeys(TEXTS)))
    )
    with_empty = [text for one in TEXTS for text in ("", one)]
    assert same(collect(own.model, with_empty), expected)


def test_it_reads_no_more_texts_than_it_needs(own: Pair) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield from TEXTS

    found = collect(own.model, endless(), max_tokens=500)
    assert 500 <= found.n_tokens < 500 + 16 * 30
    exactly = [text for _, text in zip(range(found.n_texts), endless(), strict=False)]
    assert same(found, collect(own.model, exactly))


@pytest.mark.parametrize("limit", [1, 7, 40, 10_000])
def test_batches_are_cut_by_tokens(own: Pair, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass has more tokens than allowed, unless it is a single text; little is padding."""
    shapes: list[Any] = []
    module = moment_collection.forward_pass

    def recording(host: Any, batch: Any, **given: Any) -> Any:
        shapes.append((batch.mask.numel(), len(batch.mask), int(batch.mask.sum())))
        return module(host, batch, **given)

    expected = collect(own.model)
    monkeypatch.setattr(moment_collection, "forward_pass", recording)
    monkeypatch.setattr(moment_collection, "PASS_TOKENS", limit)
    found = collect(own.model)
    assert all(n <= limit or n_rows == 1 for n, n_rows, _ in shapes)
    assert sum(n for *_, n in shapes) == found.n_tokens
    assert relative_error(found.of(1), expected.of(1)) < 1e-12
    if limit == 40:
        assert sum(n for n, *_ in shapes) < 1.3 * found.n_tokens


@pytest.mark.parametrize(
    ("family", "kind"), [("gpt2", "hooked"), ("gpt2", "bridge"), ("llama", "bridge")]
)
def test_layers_above_the_last_one_do_not_run(
    family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        model: Any = build_model(family, kind, torch.float64)
    except NotAvailable as error:
        pytest.skip(str(error))
    expected, ran = collect(model), [0, 0]
    for layer, block in enumerate(model.blocks):
        own = block.mlp.forward

        def counted(*args: Any, _own: Any = own, _layer: int = layer, **kwargs: Any) -> Any:
            ran[_layer] += 1
            return _own(*args, **kwargs)

        monkeypatch.setitem(vars(block.mlp), "forward", counted)
    found = collect(model, layers=0)
    assert ran[0] > 0 == ran[1]
    assert torch.equal(found.of(0), expected.of(0))
    # A hook of the caller sees every layer, and may change what lower layers of others compute.
    handle = model.blocks[1].register_forward_hook(lambda *_: None)
    assert torch.equal(collect(model, layers=0).of(0), expected.of(0))
    handle.remove()
    assert ran[1] > 0


def test_texts_of_a_file(own: Pair, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(["", f" {TEXTS[0]} ", *TEXTS[1:], " "]))
    for given in (file, str(file)):
        assert same(collect(own.model, given), collect(own.model))


def test_long_texts_are_truncated_to_the_context(own: Pair) -> None:
    long = "Rome" + " Rome" * 200
    found = collect(own.model, [long])
    assert found.n_tokens == N_CTX
    assert relative_error(found.of(1), slowly(own, [long], 1)[0]) < 1e-10


def test_in_float32_sums_keep_their_digits() -> None:
    model = build_model("gpt2", EITHER, torch.float32)
    reference = pair("gpt2", EITHER)
    found = collect(model)
    assert found.of(1).dtype == torch.float64
    assert 1e-13 < relative_error(found.of(1), collect(reference.model).of(1)) < 3e-6


# ---------------------------------------------------------------------------------------- resuming


class Broken(Exception):
    """Raised by an iterator of texts."""


def until(n: int, some: Sequence[str]) -> Iterator[str]:
    yield from some[:n]
    raise Broken


@pytest.fixture(scope="module")
def hundred() -> tuple[Any, list[str], SecondMoments]:
    """A float32 model, whose sums depend on batching; texts; their moments."""
    model, some = build_model("gpt2", EITHER, torch.float32), texts(100, seed=7)
    return model, some, collect(model, some)


@pytest.mark.parametrize(
    ("broken_at", "save_every"), [([17], 1), ([50], 48), ([33, 70], 20), ([5, 16, 90, 99], 20)]
)
def test_an_interrupted_collection_resumes(
    hundred: tuple[Any, list[str], SecondMoments],
    tmp_path: Path,
    broken_at: list[int],
    save_every: int,
) -> None:
    model, some, whole = hundred
    file = tmp_path / "moments.safetensors"
    for at in broken_at:
        with pytest.raises(Broken):
            collect(model, until(at, some), out=file, save_every=save_every)
    if broken_at[-1] >= 64:
        kept = SecondMoments.load(file)
        assert 0 < kept.n_texts <= broken_at[-1]
    assert same(collect(model, some, out=file, save_every=save_every), whole)
    assert same(SecondMoments.load(file), whole)
    # Already finished: only the texts are read.
    assert same(collect(model, iter(some), out=file), whole)


@pytest.mark.parametrize("stops", [[1, 100, 101], [50, 300, 555]])
def test_a_collection_in_several_calls(own: Pair, tmp_path: Path, stops: list[int]) -> None:
    some, file = texts(100, seed=8), tmp_path / "moments.safetensors"
    whole = collect(own.model, some)
    before = 0
    for stop in stops:
        part = collect(own.model, some, max_tokens=stop, out=file)
        assert part.n_tokens >= max(stop, before)
        before = part.n_tokens
    assert before < whole.n_tokens
    assert same(collect(own.model, some, out=file), whole)
    enough = collect(own.model, some, max_tokens=stops[0], out=file)
    assert same(enough, whole)  # existing data are not discarded


def test_a_file_of_another_collection_is_refused(own: Pair, tmp_path: Path) -> None:
    file = tmp_path / "moments.safetensors"
    collect(own.model, TEXTS[:20], layers=1, out=file)
    kept = file.read_bytes()
    other = build(f"{EITHER}-gpt2", seed=1).model
    for model, some, settings in (
        (own.model, TEXTS[1:], {}),
        (own.model, TEXTS[:19], {}),
        (own.model, [*TEXTS[:19], "Rome", *TEXTS[20:]], {}),
        (own.model, [TEXTS[1], TEXTS[0], *TEXTS[2:]], {}),
        (own.model, TEXTS, {"layers": 0}),
        (own.model, TEXTS, {"layers": (0, 1)}),
        (own.model, TEXTS, {"matrix": "W_in"}),
        (own.model, TEXTS, {"prepend_bos": True}),
        (other, TEXTS, {}),
    ):
        with pytest.raises(EditError, match="another file"):
            collect(model, some, **{"layers": 1, "out": file} | settings)
        assert file.read_bytes() == kept
    found = collect(own.model, TEXTS, layers=1, out=file)
    assert found.n_texts == len(TEXTS)


def test_a_file_of_another_kind(own: Pair, tmp_path: Path) -> None:
    file = tmp_path / "moments.safetensors"
    file.write_bytes(b"no statistics")
    with pytest.raises(ResultFileError):
        collect(own.model, out=file)
    with pytest.raises(ResultFileError):
        collect(own.model, TEXTS[:1], out=tmp_path / "nowhere" / "moments.safetensors")


def test_boundaries_of_texts_matter(own: Pair) -> None:
    """The checksum depends on the boundaries of texts."""
    assert (
        collect(own.model, ["Rome is", "in"]).texts != collect(own.model, ["Rome", "is in"]).texts
    )
    assert collect(own.model, ["Rome", "is"]).texts != collect(own.model, ["Rome\nis"]).texts


def test_files(own: Pair, tmp_path: Path) -> None:
    found = collect(own.model)
    found.save(tmp_path / "a.safetensors")
    again = SecondMoments.load(tmp_path / "a.safetensors")
    assert same(again, found)
    assert again.fingerprint == found.fingerprint
    assert repr(again) == repr(found)
    assert torch.equal(again.of(1), found.of(1))
    with pytest.raises(ResultFileError):
        SecondMoments.load(tmp_path / "b.safetensors")


def test_the_fingerprint_distinguishes_statistics(own: Pair) -> None:
    found = collect(own.model)
    others = [
        replace(found, moments=found.moments[::-1]),
        replace(found, prepend_bos=not found.prepend_bos),
        replace(found, layers=found.layers[::-1]),
    ]
    assert len({each.fingerprint for each in (found, *others)}) == 4


# ------------------------------------------------------------------------------------------- solve


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-2, 3.0])
def test_solve(own: Pair, ridge: float) -> None:
    found = collect(own.model, texts(100))
    c = found.of(1)
    keys = torch.randn(len(c), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ridged = c + ridge * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
    solution = found.solve(1, keys, ridge)
    assert relative_error(solution, torch.linalg.solve(ridged, keys)) < 1e-6
    assert relative_error(ridged @ solution, keys) < 1e-9
    assert relative_error(ridged @ found.solve(0, keys, ridge), keys) > 1e-2
    # A second call does not add the ridge again; float32 keys are accepted.
    assert torch.equal(found.solve(1, keys, ridge), solution)
    assert torch.equal(found.of(1), c)
    rounded = found.solve(1, keys.float(), ridge)
    assert rounded.dtype == torch.float64
    assert relative_error(rounded, torch.linalg.solve(ridged, keys.float().double())) < 1e-6
    assert relative_error(found.solve(1, keys), found.solve(1, keys, 1e-6)) == 0


def test_too_few_tokens(own: Pair) -> None:
    few = collect(own.model, texts(3))
    assert few.n_tokens <= 52
    keys = torch.ones(52, 1, dtype=torch.float64)
    for ridge in (0.0, 1e-6):
        with pytest.raises(EditError, match=f"{few.n_tokens} tokens"):
            few.solve(1, keys, ridge)
    # An explicit ridge compensates for that.
    c = few.of(1)
    ridged = c + 0.1 * c.diagonal().mean() * torch.eye(52, dtype=torch.float64)
    assert relative_error(ridged @ few.solve(1, keys, 0.1), keys) < 1e-9


def test_unused_dimensions(own: Pair) -> None:
    """Many tokens but a singular matrix: raise instead of returning numbers."""
    found = collect(own.model, ["Rome is in"] * 40)
    assert found.n_tokens > 52
    keys = torch.ones(52, 1, dtype=torch.float64)
    with pytest.raises(EditError, match="inverted"):
        replace(found, moments=tuple(torch.zeros_like(m) for m in found.moments)).solve(1, keys)


def test_solve_refuses(own: Pair) -> None:
    found = collect(own.model, texts(60), layers=1)
    with pytest.raises(EditError, match="not of layer 0"):
        found.solve(0, torch.ones(52, 1))
    with pytest.raises(EditError, match="width 52"):
        found.solve(1, torch.ones(24, 1))
    with pytest.raises(EditError, match="not of layer 2"):
        found.of(2)


# --------------------------------------------------------------------------- whose moments they are


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("gpt2", ["bridge", "hooked", "bridge-compat", "hooked-processed"]),
        ("llama", ["bridge", "bridge-compat"] if HAS_BRIDGE else ["hooked", "hooked-processed"]),
    ],
)
def test_a_model_is_identified_in_every_class(
    facts_model: Any, family: str, kinds: Sequence[str]
) -> None:
    """Also with processed or slightly edited weights; other models are refused."""
    models = {}
    for kind in kinds:
        try:
            models[kind] = build_model(family, kind, torch.float64)
        except NotAvailable:
            continue
    assert len(models) >= 2
    for model in models.values():
        found = collect(model, TEXTS[:5])
        for other in models.values():
            found.check(host_of(other), [0, 1])
    edited = build_model(family, next(iter(models)), torch.float64)
    (site,) = host_of(edited).sites(0, ("W_out",))
    with torch.no_grad():
        weight = site.weights[0]
        weight += 1e-3 * torch.randn_like(weight)
    found.check(host_of(edited), [0, 1])
    kind = next(iter(models)).partition("-")[0]
    strangers = [
        build(f"{kind}-{family}", seed=1).model,  # of the same sizes
        build_model("llama" if family == "gpt2" else "gpt2", next(iter(models)), torch.float64),
        facts_model,
    ]
    for stranger in strangers:
        with pytest.raises(EditError, match="another model"):
            found.check(host_of(stranger), [0])


def test_a_smaller_model_is_refused() -> None:
    kind = EITHER
    for settings in ({"n_layers": 1}, {"n_ctx": 4}):
        found = collect(build(f"{kind}-gpt2").model, ["Rome is in Rome and the dog runs"])
        with pytest.raises(EditError, match="another model"):
            found.check(host_of(build(f"{kind}-gpt2", **settings).model), [0])


@hooked_only
def test_a_smaller_vocabulary_is_refused() -> None:
    found = collect(build("hooked-gpt2").model, ["Rome is in Rome"])
    with pytest.raises(EditError, match="another model"):
        found.check(host_of(build("hooked-gpt2", d_vocab=50).model), [0])


def test_missing_layers(own: Pair) -> None:
    found = collect(own.model, TEXTS[:5], layers=1)
    found.check(host_of(own.model), [1])
    with pytest.raises(EditError, match="not of layer 0"):
        found.check(host_of(own.model), [0, 1])


def test_moments_of_the_facts_model(facts_model: Any) -> None:
    found = facts_moments()
    found.check(host_of(facts_model), range(8))
    assert found.layers == tuple(range(8))
    assert found.matrix == "W_out"
    assert found.n_tokens > 100_000
    assert found.prepend_bos is False
    assert found.model[:12] in found.fingerprint
    assert found.texts[:12] in found.fingerprint
    # Positive definite, and far from a multiple of the identity.
    for layer in (0, 7):
        values = torch.linalg.eigvalsh(found.of(layer))
        assert values[0] > 0
        assert values[-1] > 10 * values.mean()


def test_moments_of_the_facts_model_are_from_its_training_text(facts_model: Any) -> None:
    """Recompute some of them; the named texts are those of the generator."""
    shipped = facts_moments()
    part = collect(facts_model, training_texts(SEED), max_tokens=4000)
    assert part.matrix == shipped.matrix
    assert part.probe == shipped.probe
    for mine, theirs in zip(part.probe_inputs, shipped.probe_inputs, strict=True):
        assert relative_error(mine, theirs) < 1e-4
    for layer in (0, 3, 7):
        assert relative_error(part.of(layer), shipped.of(layer)) < 0.1
    other = collect(facts_model, ["Rome is a city."] * 16, layers=3)
    assert relative_error(other.of(3), shipped.of(3)) > 0.3
    digest = ""
    for text in islice(training_texts(SEED), shipped.n_texts):
        digest = _digest(digest, text)
    assert digest == shipped.texts


@pytest.mark.slow
def test_moments_of_the_facts_model_are_reproducible() -> None:
    found, shipped = build_moments(), facts_moments()
    assert (found.texts, found.n_tokens) == (shipped.texts, shipped.n_tokens)
    for mine, theirs in zip(found.moments, shipped.moments, strict=True):
        assert relative_error(mine, theirs) < 1e-5


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"save_every": 0}, "save_every"),
        ({"save_every": None}, "save_every"),
        ({"layers": 2}, "layer"),
        ({"layers": ()}, "layer"),
        ({"layers": "all"}, "layer"),
        ({"matrix": "W_Q"}, "attention"),
        ({"matrix": "W_gate"}, "W_gate"),
        ({"prepend_bos": 1}, "prepend_bos"),
        ({"some": "one text"}, "'one text' cannot be read.*one text per line"),
        ({"some": ""}, "cannot be read"),
        ({"some": []}, "no non-empty text"),
        ({"some": ["", ""]}, "no non-empty text"),
        ({"some": ["Rome", 5]}, "int"),
        ({"some": ["Rome", "\ud800"]}, "Unicode"),
    ],
)
def test_wrong_use_is_an_error(own: Pair, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        collect(own.model, **settings)


def test_experts_have_none() -> None:
    for kind in ("bridge", "hooked"):
        try:
            model = build_model("mixtral", kind)
        except NotAvailable:
            continue
        with pytest.raises(UnsupportedModelError):
            collect(model)
    with pytest.raises(BackwardLensError):
        collect(torch.nn.Linear(2, 2))
