"""The prediction of compress --check: sizes, updates and seconds, with nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from helpers.cli import answer, finished_run, laconic, refused
from laconic import rundir
from laconic.cli.contents import file_analyses
from laconic.cli.predict import predict, trainings
from laconic.cli.samples import First
from laconic.errors import FeatureError, RecipeError
from laconic.models import digits_cnn
from laconic.recipe import Recipe
from laconic.recover import (
    Gradient,
    Hidden,
    Hint,
    Label,
    Logits,
    ProximalChannels,
    Recalibrate,
    Reconstruct,
    Train,
)
from laconic.recover.descent import Descent
from laconic.ship import save
from laconic.step import Step
from laconic.structure import LayerDrop, MaximalGain, PlanSplit, Prune
from laconic.tasks import Task
from laconic.weights import MixedPrecision, Quantize, QuantNoise, mixed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe, its data, and the run the recipe made."""
    return finished_run(tmp_path_factory.mktemp("cli"))


def test_check_predicts_and_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = answer("compress", folder / "recipe.yaml", "--check")
    assert [row["step"] for row in found["rows"]] == ["original", "prune", "quantize", "train"]
    assert [row["updates"] for row in found["rows"]] == [0, 0, 0, 2]
    assert found["rows"][-1]["seconds"] > 0
    assert found["seconds"] == pytest.approx(sum(row["seconds"] for row in found["rows"]))
    assert list(tmp_path.iterdir()) == []
    text = laconic("compress", folder / "recipe.yaml", "--check").stdout
    assert "recipe fits: prune, quantize, train" in text
    heads = "Step Predicted size Codes alone, all File, all Updates Training"
    assert heads in [" ".join(line.split()) for line in text.splitlines()]
    assert "Predicted: a file about" in text
    assert "(codes alone, as papers count: 26.1x)" in text


def test_the_predicted_size_is_near_the_one_that_comes_out(folder: Path) -> None:
    rows = answer("compress", folder / "recipe.yaml", "--check")["rows"]
    history, _ = rundir.read_history(folder / "run")
    for row, measured in zip(rows, history, strict=True):
        assert row["nominal_bytes"] == pytest.approx(measured.nominal_bits / 8, rel=1e-3)
        assert row["size_bytes"] == pytest.approx(measured.size_bytes, rel=0.05)


def test_check_refuses_what_compress_would_refuse(folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    said = refused("compress", recipe, "--check", "--set", "steps.2.train.scope=conv9")
    assert said.startswith(f"{recipe}:") and ": steps.2 (train): 'conv9' selects no" in said
    setting = "steps.0.prune.keeps=1"
    said = refused("compress", recipe, "--check", "--set", setting)
    assert said == f"--set {setting}: steps.0 (prune): 'keeps' is not a field; did you mean 'keep'?"


def small_task() -> Task:
    images, labels = torch.zeros(50, 1, 8, 8), torch.arange(50) % 10
    return Task((images, labels), (images[:10], labels[:10]), (images[:10], labels[:10]))


@pytest.mark.parametrize(
    ("steps", "updates"),
    [
        ([Train(epochs=3, batch=20)], [9]),
        ([Prune("weights", keep=0.5, rounds=4, retrain=Train(epochs=2, batch=25))], [16]),
        ([Prune("weights", keep=0.5, retrain=Train(batch=50)), Train(batch=10)], [1, 5]),
        ([Train(batch=50, during=(Prune("weights", keep=0.5),)), Quantize(8)], [1, 0]),
    ],
)
def test_updates_are_counted_through_nested_training(steps: list[Any], updates: list[int]) -> None:
    found = predict(Recipe(tuple(steps)), digits_cnn(), small_task(), device="cpu")
    assert [row.updates for row in found.rows[1:]] == updates
    assert all(row.seconds > 0 for row in found.rows if row.updates)


def test_trainings_are_found_however_deep() -> None:
    inner = Prune("weights", keep=0.5, rounds=2, retrain=Train(epochs=3))
    outer = Prune("weights", keep=0.5, rounds=5, retrain=inner)
    assert list(trainings(outer)) == [(Train(epochs=3), 10)]
    assert list(trainings(Quantize(4))) == []


@pytest.mark.parametrize("steps", [(Prune("weights", keep=0.25), Quantize(4)), (Quantize(8),)])
def test_the_nominal_size_is_weights_times_keep_times_bits(steps: tuple[Any, ...]) -> None:
    model = digits_cnn()
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    others = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    keep, bits = (0.25, 4) if len(steps) == 2 else (1.0, 8)
    found = predict(Recipe(steps), model, None, device="cpu").rows[-1].nominal_bytes
    assert found == pytest.approx((weights * keep * bits + others * 32) / 8, abs=5)


def test_a_prediction_of_parts_fits_them_by_a_few_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    update = Descent.update
    monkeypatch.setattr(Descent, "update", lambda *args: taken.append(1) or update(*args))
    step = Reconstruct(solve=Gradient(3000, penalty=ProximalChannels(0.5)))
    first, last = predict(Recipe((step,)), digits_cnn(), small_task(), device="cpu").rows
    assert last.size_bytes < 0.6 * first.size_bytes
    assert last.updates == 3 * 3000 and last.seconds > 0
    assert len(taken) < 30


def seconds_of(*steps: Step, task: Task | None = None) -> list[float]:
    found = predict(Recipe(steps), digits_cnn(), task or small_task(), device="cpu")
    return [row.seconds for row in found.rows[1:]]


def test_what_is_looked_at_many_times_is_looked_at_few_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = []
    find = mixed.eigenvalues

    def counted(*given: Any, iterations: int, **options: Any) -> Any:
        looks.append(iterations)
        return find(*given, iterations=iterations, **options)

    monkeypatch.setattr(mixed, "eigenvalues", counted)
    (one,) = seconds_of(MixedPrecision(batches=1, batch=20, iterations=1))
    assert looks == [1] and one > 0
    (many,) = seconds_of(MixedPrecision(batches=2, batch=20, iterations=1000))
    assert looks == [1, 1, 4]
    assert many > 0
    assert all(each > 0 for each in seconds_of(Recalibrate(1, batch=10), Quantize(4)))


def test_what_is_chosen_by_data_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MaximalGain, "measured", None)
    plan = PlanSplit("size <= 0.1x", choose=MaximalGain())
    first, last = predict(Recipe([plan]), digits_cnn(), small_task(), device="cpu").rows
    assert last.nominal_bytes < 0.1 * first.nominal_bytes


@pytest.mark.parametrize("name", ["layer_drop", "quant_noise"])
def test_a_training_that_is_left_out_is_refused(name: str) -> None:
    for retrain in ("retrain: ", "retrain: null", ""):
        with pytest.raises(RecipeError, match="retrain"):
            Recipe.parse(f"steps: [{name}: {{{retrain}}}]")


def test_a_training_counts_wherever_it_stands() -> None:
    inner = Train(epochs=2, batch=25, during=(Prune("weights", keep=0.5),))
    steps = (QuantNoise(0.5, proxy="zero", retrain=inner), LayerDrop(retrain=inner))
    assert [list(trainings(step)) for step in steps] == [[(inner, 1)]] * 2
    first, last = predict(Recipe(steps[:1]), digits_cnn(), small_task(), device="cpu").rows
    assert last.updates == 4 and last.seconds > 0
    assert last.nominal_bytes < 0.6 * first.nominal_bytes


def test_a_prediction_changes_neither_the_network_nor_the_generator() -> None:
    model, task = digits_cnn(), small_task()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    predict(Recipe((Prune("weights", keep=0.5), Train(batch=25))), model, task, device="cpu")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(task.train) == 50
    assert len(task.validate) == 10


def test_a_prediction_lends_the_network_as_its_own_teacher() -> None:
    steps = (
        Prune("weights", keep=0.5, retrain=Train(0.5 * Label() + 0.5 * Logits(4.0), batch=25)),
        Train(Hint("output:conv1"), batch=50),
    )
    found = predict(Recipe(steps), digits_cnn(), small_task(), device="cpu")
    assert [row.updates for row in found.rows[1:]] == [2, 1]
    assert all(row.seconds > 0 for row in found.rows[1:])


def test_a_prediction_refuses_features_that_the_network_does_not_have() -> None:
    recipe = Recipe((Train(Hidden(), batch=25),))
    with pytest.raises(FeatureError, match="0 layers of the student"):
        predict(recipe, digits_cnn(), small_task(), device="cpu")


# ------------------------------------------------------------------ DataLoaders of one's own


def loaders(batches: list[list[int]]) -> Task:
    """Return a task over DataLoaders that decide by themselves what a batch is."""
    images, labels = torch.zeros(50, 1, 8, 8), torch.arange(50) % 10
    data: Any = TensorDataset(images, labels)
    own = [DataLoader(data, batch_sampler=batches) for _ in range(3)]
    return Task.from_loaders(*own)


HALVES = [list(range(25)), list(range(25, 50))]


def test_data_that_cannot_be_chosen_from_are_predicted_for() -> None:
    task = loaders(HALVES)
    steps = (Train(batch=64), Prune("weights", keep=0.5, rounds=2, retrain=Train(epochs=3)))
    found = predict(Recipe(steps), digits_cnn(), task, device="cpu")
    assert [row.updates for row in found.rows[1:]] == [2, 12]
    assert all(row.seconds > 0 for row in found.rows[1:])


def test_data_that_cannot_be_chosen_from_are_analysed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(digits_cnn(), path)
    found = file_analyses([path], model=None, task=loaders(HALVES), batches=1)
    assert found


def test_files_of_a_network_of_the_users_own_are_each_their_own(tmp_path: Path) -> None:
    networks = {name: digits_cnn() for name in ("one", "two")}
    with torch.no_grad():
        networks["two"].fc2.weight.mul_(3)
    paths = [tmp_path / f"{name}.safetensors" for name in networks]
    for path, network in zip(paths, networks.values(), strict=True):
        save(network, path)
    pair = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    task = Task(pair, pair, pair)
    found = file_analyses(paths, model=digits_cnn(), task=task, batches=1)
    apart = [file_analyses([path], model=None, task=task, batches=1) for path in paths]
    values = [each["eigenvalues"].values for each in (found, *apart)]
    assert values[0] == values[1] | values[2] and values[1]["one"] != values[2]["two"]
    assert found["bits"] == apart[0]["bits"]


def test_first_examples_are_those_of_every_epoch() -> None:
    task = loaders([[3, 1], [4], [0, 2, 5]])
    whole = First(task.train, 1, batches=2)
    assert [batch.targets.tolist() for batch in whole.batches(256)] == [[3, 1], [4]]
    few = First(task.train, 1, batches=2, most=1)
    assert [batch.targets.tolist() for batch in few.batches(256)] == [[3], [4]]
    assert [batch.targets.tolist() for batch in few.batches(256, start=1)] == [[4]]
    assert list(few.batches(256, start=3)) == []
    assert few.targets().tolist() == [3, 4] and few.batch_count(1) == 2
    assert few.plain().example(2).targets.tolist() == [3, 1]
    assert few.labelled and len(few) == 2
    arrays = First(small_task().train, 20, batches=9)
    assert (arrays.batch_count(20), len(arrays)) == (3, 50)
    assert arrays.subset([4]).targets().tolist() == [4]
    shuffled = [batch.targets for batch in arrays.batches(7, seed=0, epoch=1)]
    again = [batch.targets for batch in small_task().train.batches(7, seed=0, epoch=1)]
    assert len(shuffled) == 8 and all(map(torch.equal, shuffled, again))
