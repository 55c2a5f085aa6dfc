"""Shipped recipes: what those of few bits represent, by name, and what two make of a network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import laconic
from laconic.models import load_model, resnet
from laconic.models.halves import Halves
from laconic.recipe import Recipe, shipped_recipes
from laconic.recover import Reconstruct, Train
from laconic.ship import save
from laconic.step import State, run_step
from laconic.structure import Prune
from laconic.tasks import Task
from laconic.weights import (
    Activation,
    Affine,
    Binary,
    Gobo,
    Groups,
    LearnedClip,
    MinMax,
    MovingAverage,
    Product,
    QuantNoise,
    Representation,
    Symmetric,
    Ternary,
    activations_of,
)
from laconic.weights.laid import laid_tensors

VOCABULARY, TOKENS = 50, 8
PLACES = ("query", "key", "probabilities", "value")

WORDS = ["bert.embeddings.word_embeddings"]
EMBEDDINGS = [f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")]
LAYERS = [f"bert.encoder.layer.{place}" for place in range(2)]
IN_ATTENTION = ["self.query", "self.key", "self.value", "output.dense"]
ATTENTION = [f"{layer}.attention.{part}" for layer in LAYERS for part in IN_ATTENTION]
FEED_FORWARD = [f"{layer}.{part}.dense" for layer in LAYERS for part in ("intermediate", "output")]
ENCODER = ATTENTION + FEED_FORWARD
POOLER, HEAD = ["bert.pooler.dense"], ["classifier"]
OPERANDS = [f"{layer}.attention.self" for layer in LAYERS]


def encoder() -> nn.Module:
    """Return a BERT of two layers with a head, of random weights."""
    transformers = pytest.importorskip("transformers", reason="encoders need transformers")
    config = transformers.BertConfig(
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
    )
    network: nn.Module = transformers.BertForSequenceClassification(config)
    return network.eval()


def texts() -> Task:
    generator = torch.Generator().manual_seed(0)
    pair = torch.randint(VOCABULARY, (24, TOKENS), generator=generator), torch.arange(24) % 2
    return Task(pair, pair, pair)


def images() -> Task:
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(20, 3, 32, 32, generator=generator), torch.arange(20) % 10
    return Task(pair, pair, pair)


def untrained(recipe: Recipe) -> Recipe:
    """Return the same steps, but those that train."""
    trains = (QuantNoise, Reconstruct, Train)
    steps = [step for step in recipe.steps if not isinstance(step, trains)]
    return recipe.model_copy(update={"steps": tuple(steps)})


def after(name: str, model: nn.Module, task: Task, *changes: str) -> nn.Module:
    """Return a network after the steps of a recipe, without their training."""
    recipe = Recipe.read(shipped_recipes()[name], changes=changes)
    recipe.check(model, task)
    state = State(model, task)
    for step in untrained(recipe).steps:
        run_step(step, state)
    return state.model


def stored(model: nn.Module) -> dict[str, Representation]:
    """Return module -> how its weight is stored, of all that are not plain."""
    found = {name: layer.representation for name, (layer, _) in laid_tensors(model).items()}
    return {name.removesuffix(".weight"): each for name, each in found.items()}


def halves(paths: list[str]) -> list[str]:
    return [f"{path}.{half}" for path in paths for half in ("first", "second")]


def inputs(paths: list[str], activation: Activation) -> dict[str, dict[str, Activation]]:
    return {path: {"input": activation} for path in paths}


def operands(activation: Activation) -> dict[str, dict[str, Activation]]:
    return {path: dict.fromkeys(PLACES, activation) for path in OPERANDS}


# What is quantised, system by system; what is not named here stays in floats.
STORED: dict[str, dict[str, Representation]] = {
    "ternarybert": dict.fromkeys(ENCODER + POOLER, Ternary())
    | dict.fromkeys(WORDS, Ternary("row")),
    "mrem": dict.fromkeys(ENCODER, Ternary()) | dict.fromkeys(WORDS, Ternary("row")),
    "binarybert": dict.fromkeys(halves(ENCODER + POOLER), Binary())
    | dict.fromkeys(halves(WORDS), Binary("row")),
    "q8bert": dict.fromkeys(EMBEDDINGS + ENCODER + POOLER + HEAD, Symmetric(8)),
    "gobo": dict.fromkeys(ENCODER + POOLER, Gobo(3)) | dict.fromkeys(WORDS, Gobo(4)),
    "quant-noise": dict.fromkeys(ATTENTION, Product(block=4))
    | dict.fromkeys(FEED_FORWARD + WORDS, Product(block=8)),
}  # fmt: skip
ROUNDED: dict[str, dict[str, dict[str, Activation]]] = {
    "ternarybert": inputs(ENCODER + POOLER, MinMax(8)) | operands(MinMax(8)),
    "mrem": inputs(ENCODER, MinMax(8)) | operands(MinMax(8)),
    "binarybert": inputs(ENCODER + POOLER, LearnedClip(8)) | operands(LearnedClip(8)),
    "q8bert": inputs(ENCODER + POOLER + HEAD, MovingAverage(8, levels="symmetric"))
    | operands(MovingAverage(8, levels="symmetric")),
    "gobo": {},
    "quant-noise": {},
}


# What does not fit an encoder of two layers.
CHANGES = {"mrem": ("steps.1.reconstruct.parts=2",)}


@pytest.mark.parametrize("name", STORED)
def test_a_recipe_quantises_what_its_paper_does(name: str) -> None:
    model = after(name, encoder(), texts(), *CHANGES.get(name, ()))
    assert stored(model) == STORED[name]
    assert activations_of(model) == ROUNDED[name]


def test_q_bert_mixes_layers() -> None:
    """All of the more curved layer in 4 bits, all of the other in 2; embeddings in 8."""
    model = after("q-bert", encoder(), texts())
    found = stored(model)
    assert {name: found.pop(name) for name in EMBEDDINGS} == dict.fromkeys(
        EMBEDDINGS, Affine(8, "row")
    )
    assert sorted(found) == sorted(ENCODER)
    widths = []
    for layer in LAYERS:
        own = {each for name, each in found.items() if name.startswith(f"{layer}.")}
        (representation,) = own
        widths.append(dict(representation)["bits"])
        assert representation == Affine(widths[-1], Groups(128))
    assert sorted(widths) == [2, 4]
    assert activations_of(model) == inputs(ENCODER, MinMax(8)) | operands(MinMax(8))


@pytest.mark.parametrize(
    ("budget", "kinds"),
    [("14 MiB", {True}), ("4500 B", {True, False}), ("3440 B", {False})],
    ids=["all", "some", "none"],
)
def test_adaptive_splitting_splits_what_fits(budget: str, kinds: set[bool]) -> None:
    change = f"steps.2.plan_split.budget=size <= {budget}"
    model = after("adaptive-splitting", encoder(), texts(), change)
    paths = WORDS + ENCODER + POOLER
    split = [path for path in paths if isinstance(model.get_submodule(path), Halves)]
    whole = [path for path in paths if path not in split]
    assert {path in split for path in paths} == kinds
    assert stored(model) == {
        path: Binary("row" if path.startswith(WORDS[0]) else "tensor")
        for path in halves(split) + whole
    }
    expected = inputs(ENCODER + POOLER, LearnedClip(8)) | operands(LearnedClip(8))
    assert activations_of(model) == expected


def test_the_first_and_the_last_layer_of_a_cnn_are_wider() -> None:
    model = after("cnn-qat", resnet(8), images())
    inner = [f"layer{group}.0.conv{place}" for group in (1, 2, 3) for place in (1, 2)]
    few, many = (Symmetric(bits, granularity="row") for bits in (4, 8))
    assert stored(model) == dict.fromkeys(inner, few) | dict.fromkeys(["conv1", "linear"], many)
    assert activations_of(model) == inputs(["conv1", "linear", *inner], MovingAverage(8))


def run(name: str, model: nn.Module, task: Task, *changes: str) -> laconic.Result:
    """Return what a recipe makes of a network, its training shortened by these changes."""
    recipe = Recipe.read(shipped_recipes()[name], changes=changes)
    return laconic.compress(model, task, recipe.steps)


def test_cross_distillation_takes_half_of_the_inner_channels_and_leaves_norms() -> None:
    model = resnet(8)
    changes = ("steps.0.reconstruct.solve.gradient.updates=3", "steps.1.train.epochs=1")
    result = run("cross-distillation", model, images(), *changes)
    assert [each.step for each in result.history] == ["original", "reconstruct", "train"]
    found, before = dict(result.model.named_parameters()), dict(model.named_parameters())
    assert found.keys() == before.keys()
    cut = {
        name: tuple(each.shape) for name, each in found.items() if each.shape != before[name].shape
    }
    wanted: dict[str, tuple[int, ...]] = {}
    for group, enter, width in ((1, 16, 16), (2, 16, 32), (3, 32, 64)):
        block, half = f"layer{group}.0", width // 2
        wanted |= {f"{block}.conv1.weight": (half, enter, 3, 3)}
        wanted |= {f"{block}.bn1.weight": (half,), f"{block}.bn1.bias": (half,)}
        wanted |= {f"{block}.conv2.weight": (width, half, 3, 3)}
    assert cut == wanted
    whole = before.keys() - cut.keys()
    moved = {name for name in whole if not torch.equal(found[name], before[name])}
    assert moved == {name for name in whole if "bn" not in name}
    assert [*result.history[1].curves] == ["layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2"]


def test_mrem_moves_the_layers_part_by_part_and_nothing_else() -> None:
    model = encoder()
    changes = ("steps.1.reconstruct.parts=2", "steps.1.reconstruct.solve.gradient.updates=3")
    result = run("mrem", model, texts(), *changes)
    assert stored(result.model) == STORED["mrem"]
    assert activations_of(result.model) == ROUNDED["mrem"]
    assert [len(curve) for curve in result.history[-1].curves.values()] == [3, 3]
    before = after("mrem", copy.deepcopy(model), texts(), changes[0])
    found = dict(result.model.named_parameters())
    still = {name for name, each in before.named_parameters() if torch.equal(each, found[name])}
    kept = ("bert.pooler.", "classifier.")
    assert still == {name for name in found if name.startswith(kept)}


def test_the_first_line_says_what_a_recipe_does() -> None:
    """``laconic list recipes`` shows nothing else of it."""
    for path in shipped_recipes().values():
        assert path.read_text(encoding="utf-8").partition("\n")[0].endswith(".")


def test_every_recipe_is_laid_here() -> None:
    """A new one needs its row of the table above; these three keep all weights as they are."""
    here = {*STORED, "q-bert", "adaptive-splitting", "cnn-qat"}
    assert {*shipped_recipes()} - here == {
        "cross-distillation",
        "deep-compression",
        "dynabert-width",
    }


def test_binarybert_starts_from_a_file_and_ends_in_one(tmp_path: Path) -> None:
    """The file of a pruned encoder is a model; what becomes of it needs no code to be loaded."""
    half = encoder()
    cuts: list[Any] = [
        Prune("heads", keep=0.5, by="magnitude"),
        Prune("neurons", keep=0.5, by="magnitude", scope="*.encoder.*"),
    ]
    for cut in cuts:
        run_step(cut, State(half, texts()))
    save(half, tmp_path / "half.safetensors")
    spec = {"laconic:load": {"path": str(tmp_path / "half.safetensors")}}
    model = after("binarybert", load_model(spec), texts())
    assert stored(model) == STORED["binarybert"]
    batch = texts().example_batch(4)
    wanted = texts().call(model, batch)
    save(model, tmp_path / "binary.safetensors")
    again = laconic.load(tmp_path / "binary.safetensors")
    assert torch.equal(texts().call(again, batch), wanted)
