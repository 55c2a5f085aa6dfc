"""Train: every part of the one training loop against the same done by hand."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laconic.errors import ChainError, RecipeError, RunError, ScopeError, TaskError
from laconic.progress import reporting
from laconic.recover import (
    L1,
    L2,
    SGD,
    Adam,
    AdamW,
    Constant,
    Cosine,
    Label,
    Linear,
    Logits,
    Milestones,
    Stop,
    Train,
)
from laconic.recover.train import _Loop
from laconic.scope import Scope
from laconic.ship.checkpoint import load_checkpoint, save_checkpoint
from laconic.step import During, State, Step, Value, derive, run_step
from laconic.structure import Gradual, Prune
from laconic.tasks import Task, digits
from laconic.weights import (
    Binary,
    KMeans,
    LearnedStep,
    Quantize,
    Symmetric,
    Ternary,
    bake,
    lay,
)
from laconic.weights.laid import laid_tensors

BATCH, EXAMPLES = 8, 20  # two full batches and a rest of four
FULL = EXAMPLES


def task(examples: int = EXAMPLES, **options: Any) -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, 6, generator=generator)
    labels = torch.arange(examples) % 3
    held = torch.randn(9, 6, generator=generator), torch.arange(9) % 3
    return Task((inputs, labels), held, held, **options)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def with_norm() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
        )


def trained(train: Train, model: nn.Module | None = None, data: Task | None = None) -> Any:
    """Return the network after a training, with seed 0."""
    state = State(network() if model is None else model, task() if data is None else data)
    train.check(state.model, state.task)
    run_step(train, state)
    return state.model


def test_the_loss_of_every_update_is_noted_by_objective() -> None:
    state = State(network(), task())
    run_step(Train(0.5 * Label() + 0.5 * Label(), epochs=2, batch=BATCH, penalty=L2(0.1)), state)
    assert {name: len(losses) for name, losses in state.curves.items()} == {"train: label": 6}
    first = _Loop(Train(batch=BATCH, penalty=L2(0.1)), State(network(), task()))
    batch = next(first.task.train.batches(BATCH, seed=seed_of()))
    assert state.curves["train: label"][0] == pytest.approx(first.loss(batch, (), 0.0).item())


def test_trainings_within_a_step_go_on_with_its_curve() -> None:
    state = State(network(), task(), (network().requires_grad_(False),))
    lessons = Train(batch=BATCH), Train(Label() + Logits(2.0), batch=BATCH)
    for retrain in lessons:
        run_step(Prune("weights", keep=0.5, rounds=2, retrain=retrain), state)
    lengths = {name: len(losses) for name, losses in state.curves.items()}
    assert lengths == {"train: label": 6, "train: label + logits": 6}


def seed_of(seed: int = 0) -> int:
    """Return the seed a training gets from ``run_step`` in a run of this seed."""
    return derive(seed, "train", 0)


def same(left: nn.Module, right: nn.Module) -> bool:
    one, two = left.state_dict(), right.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def plain_sgd(lr: float = 0.1, **fields: Any) -> SGD:
    return SGD(lr, momentum=0.0, **{"decay": Constant(), **fields})


# ------------------------------------------------------------------ against a loop by hand


def by_hand(
    train: Train, model: nn.Module, data: Task, made: Callable[..., torch.optim.Optimizer]
) -> nn.Module:
    """Return the network after the same training, written as users write it."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    decayed = {"params": matrices, "weight_decay": train.optimizer.weight_decay}
    optimizer = made([decayed, {"params": others, "weight_decay": 0.0}])
    per_epoch = math.ceil(len(data.train) / train.batch)
    for epoch in range(train.epochs):
        model.train()
        batches = data.train.batches(train.batch, seed=seed_of(), epoch=epoch)
        for number, batch in enumerate(batches):
            torch.manual_seed(derive(seed_of(), "update", epoch, number))
            done = (epoch * per_epoch + number) / (train.epochs * per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = train.optimizer.lr * train.optimizer.decay.factor(done)
            loss = F.cross_entropy(model(*batch.inputs), batch.targets)
            optimizer.zero_grad()
            loss.backward()
            if train.optimizer.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), train.optimizer.clip)
            optimizer.step()
    return model.eval()


def test_what_torch_would_not_make_is_refused_in_the_recipe() -> None:
    with pytest.raises(ValueError, match="give a momentum above 0"):
        SGD(0.1, momentum=0.0, nesterov=True)


MADE: dict[str, tuple[Any, Callable[..., torch.optim.Optimizer]]] = {
    "sgd": (
        SGD(0.1, weight_decay=0.1, nesterov=True),
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    ),
    "adam": (Adam(0.01, clip=0.5), lambda groups: torch.optim.Adam(groups, lr=0.01, fused=True)),
    "adamw": (
        AdamW(0.01, decay=Linear(warmup=0.4)),
        lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_the_loop_is_the_one_that_people_write(name: str) -> None:
    optimizer, made = MADE[name]
    train = Train(epochs=3, batch=BATCH, optimizer=optimizer, stop=Stop(keep="last"))
    assert same(trained(train, with_norm()), by_hand(train, with_norm(), task(), made))


def gradient(model: nn.Module, data: Task, names: list[str]) -> dict[str, Tensor]:
    """Return the gradient of the loss on the whole training split."""
    model.zero_grad()
    (batch,) = data.train.batches(len(data.train))
    data.loss(data.call(model, batch), batch).backward()
    return {name: model.get_parameter(name).grad.clone() for name in names}  # type: ignore[union-attr]


def laid_step() -> nn.Sequential:
    model = with_norm()
    lay(model, "0.weight", LearnedStep(4, granularity="row"))
    return model


def scales_of(model: nn.Module) -> Tensor:
    return laid_tensors(model)["0.weight"][0].state["scale"].detach()


def test_what_representations_learn_has_a_rate_of_its_own() -> None:
    """Adam's first update moves every number by its rate."""
    alone = {"batch": FULL, "stop": Stop(keep="last")}
    held, moved = (
        trained(Train(optimizer=Adam(1e-9, scales=scales, decay=Constant()), **alone), laid_step())
        for scales in (None, 1e-3)
    )
    first = laid_step()
    assert torch.allclose(moved[0].bias, first[0].bias, atol=1e-8)
    assert torch.allclose(scales_of(held), scales_of(first), atol=1e-8)
    step = (scales_of(moved) - scales_of(first)).abs()
    assert torch.allclose(step, torch.tensor(1e-3), rtol=1e-2)


def test_what_representations_learn_does_not_decay() -> None:
    model = laid_step()
    learned = next(p for name, p in model.named_parameters() if name.endswith(".scale"))
    made = AdamW(1e-3, weight_decay=0.5, scales=1e-2).build(model.parameters(), {learned})
    ours = [group for group in made.param_groups if any(p is learned for p in group["params"])]
    assert [(g["weight_decay"], g["initial_lr"], len(g["params"])) for g in ours] == [(0, 0.01, 1)]


ONE = {"batch": FULL, "epochs": 1, "stop": Stop(keep="last")}


@pytest.mark.parametrize(
    ("penalty", "slope"),
    [(L1(0.01), lambda w: 0.01 * w.sign()), (L2(0.01), lambda w: 0.01 * 2 * w)],
    ids=["l1", "l2"],
)
def test_the_penalty_pulls_on_matrices_of_the_scope(
    penalty: L1 | L2, slope: Callable[[Tensor], Tensor]
) -> None:
    start, after = network(), trained(Train(**ONE, optimizer=plain_sgd(), penalty=penalty))
    grads = gradient(start, task(), ["0.weight", "0.bias", "2.weight"])
    for name in ("0.weight", "2.weight"):
        before = start.get_parameter(name).detach()
        moved = before - 0.1 * (grads[name] + slope(before))
        assert torch.allclose(after.get_parameter(name), moved, atol=1e-7)
    bias = start.get_parameter("0.bias").detach() - 0.1 * grads["0.bias"]
    assert torch.allclose(after.get_parameter("0.bias"), bias, atol=1e-7)


def test_the_gradient_is_clipped_to_its_norm() -> None:
    start, after = network(), trained(Train(**ONE, optimizer=plain_sgd(clip=0.01)))
    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(after.parameters(), start.parameters(), strict=True)]
    )
    assert float(moved.detach().norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("decay", "factors"),
    [
        (Constant(), [1, 1, 1, 1, 1, 1]),
        (Linear(), [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        (Linear(warmup=1 / 3), [0, 0.5, 1, 0.75, 0.5, 0.25]),
        (Cosine(), [(1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]),
        (Cosine(warmup=0.5), [0, 1 / 3, 2 / 3, 1, 0.75, 0.25]),
        (Milestones(at=(0.5, 5 / 6), by=0.1), [1, 1, 1, 0.1, 0.1, 0.01]),
    ],
    ids=repr,
)
def test_the_learning_rate_decays(
    decay: Any, factors: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs of three updates; with SGD the rate is what a constant gradient moves by."""
    rates: list[float] = []
    step = torch.optim.SGD.step

    def note(self: torch.optim.SGD, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", note)
    trained(Train(epochs=2, batch=BATCH, optimizer=plain_sgd(0.2, decay=decay)))
    assert rates == pytest.approx([0.2 * factor for factor in factors])


# ------------------------------------------------------------------ which epoch is kept


def scored(*values: float, loss: tuple[float, ...] = ()) -> Task:
    """Return a task whose validation says these scores, and losses, epoch by epoch."""
    script, losses = iter(values), iter(loss)
    data = task(metrics={"told": lambda outputs, targets: next(script)})
    plain = data.loss

    def told(outputs: Tensor, batch: Any) -> Tensor:
        value = plain(outputs, batch)
        # Training's losses carry a gradient; validation's are the scripted ones.
        return value if value.requires_grad or not loss else torch.tensor(next(losses))

    data.loss = told
    return data


def epochs(count: int) -> nn.Module:
    """Return the network after so many epochs at a constant rate."""
    return trained(constant(count, Stop(keep="last")))


def constant(count: int, stop: Stop) -> Train:
    return Train(epochs=count, batch=BATCH, optimizer=plain_sgd(), stop=stop)


@pytest.mark.parametrize(
    ("values", "stop", "kept"),
    [
        ((0.1, 0.5, 0.4, 0.3, 0.6), Stop(), 5),
        ((0.1, 0.5, 0.4, 0.3, 0.2), Stop(), 2),
        ((0.1, 0.5, 0.4, 0.3, 0.6), Stop(patience=2), 2),
        ((0.1, 0.5, 0.4, 0.6, 0.3), Stop(patience=2), 4),
        ((0.1, 0.5, 0.4, 0.3, 0.6), Stop(patience=2, keep="last"), 4),
        ((0.1, 0.5, 0.4, 0.3, 0.2), Stop(keep="last"), 5),
        ((math.nan, 0.1, 0.2, math.nan, 0.1), Stop(), 3),
        ((math.nan, math.nan, 0.3, 0.2, 0.1), Stop(patience=2), 2),
    ],
)
def test_the_kept_epoch(values: tuple[float, ...], stop: Stop, kept: int) -> None:
    assert same(trained(constant(5, stop), data=scored(*values)), epochs(kept))


def test_a_tie_goes_to_the_lower_loss_then_to_the_earlier_epoch() -> None:
    data = scored(0.5, 0.5, 0.5, loss=(0.3, 0.2, 0.2))
    assert same(trained(constant(3, Stop()), data=data), epochs(2))


def test_what_still_changes_the_network_is_not_undone() -> None:
    """The best score comes before the last weight is pruned; what is kept has them pruned."""
    step = Prune("weights", keep=0.25, schedule=Gradual(end=0.6))
    train = constant(5, Stop()).model_copy(update={"during": (step,)})
    model = trained(train, data=scored(0.9, 0.9, 0.5, 0.4, 0.3))
    alive = [int(layer.mask.sum()) for layer, _ in laid_tensors(model).values()]
    assert alive == [12, 6]
    last = train.model_copy(update={"stop": Stop(keep="last")})
    progress: dict[int, nn.Module] = {}

    class Copy(During):
        def apply(self, state: State) -> None: ...

        def update(self, state: State, progress_: float, *, since: float) -> None:
            progress[round(progress_ * 15)] = copy.deepcopy(state.model)

    Value._registry[Step].pop("copy")
    Value._registry[During].pop("copy", None)
    trained(last.model_copy(update={"during": (step, Copy())}))
    assert same(model, progress[9].eval())


def test_patience_counts_from_where_the_network_is_settled() -> None:
    step = Prune("weights", keep=0.5)
    train = constant(4, Stop(patience=1)).model_copy(update={"during": (step,)})
    script = iter((0.9, 0.8, 0.7, 0.6))
    trained(train, data=task(metrics={"told": lambda outputs, targets: next(script)}))
    assert list(script) == []


# ------------------------------------------------------------------ what moves


def test_frozen_parameters_stay() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    after = trained(Train(epochs=2, batch=BATCH, optimizer=AdamW(0.1)), model)
    assert torch.equal(after[0].weight, before)
    assert not after[0].weight.requires_grad
    assert not torch.equal(after[2].weight, network()[2].weight)


def test_nothing_to_train_is_refused() -> None:
    model = network().requires_grad_(False)
    with pytest.raises(RunError, match="every parameter in scope '0' is frozen"):
        run_step(Train(scope="0"), State(model, task()))
    with pytest.raises(ScopeError, match="'1' selects no module with parameters to train"):
        Train(scope="1").check(network(), task())


def test_only_the_scope_is_trained_and_statistics_outside_stay() -> None:
    model = with_norm()
    after = trained(Train(scope="4", epochs=2, batch=BATCH, optimizer=AdamW(0.1)), model)
    start = with_norm().state_dict()
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, start[name]) == (not name.startswith("4.")), name


def test_statistics_inside_the_scope_follow() -> None:
    after = trained(Train(scope="1", batch=BATCH), with_norm())
    assert int(after[1].num_batches_tracked) == 3
    assert torch.equal(after[0].weight, with_norm()[0].weight)


class Tied(nn.Module):
    """A matrix that two modules share, under its first name in ``first``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.second(self.first(inputs).relu()).relu())
        return outputs


@pytest.mark.parametrize("laid", [False, True])
def test_a_shared_parameter_belongs_to_each_of_its_modules(laid: bool) -> None:
    model = Tied()
    if laid:
        lay(model, "first.weight", Symmetric(8))
    before = model.first.weight.detach().clone()
    trained(Train(scope="second", batch=BATCH, optimizer=plain_sgd()), model)
    assert not torch.equal(model.first.weight, before)
    assert torch.equal(model.first.weight, model.second.weight)


def test_the_order_of_parameters_does_not_depend_on_what_is_laid() -> None:
    from laconic.recover.train import _trained

    plain = Tied()
    names = {id(parameter): name for name, parameter in plain.named_parameters()}
    before = [names[id(parameter)] for parameter in _trained(Train(), plain)]
    for name in ("second.weight", "last.weight"):
        lay(plain, name, Symmetric(8))
    assert [names[id(parameter)] for parameter in _trained(Train(), plain)] == before


def test_gradients_are_left_nowhere() -> None:
    model = trained(Train(scope="2", batch=BATCH))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_trains_whatever_the_caller_turned_off(context: Any) -> None:
    from laconic import compress

    with context():
        result = compress(network(), task(), [Train(batch=BATCH)])
    assert not same(result.model, network())


# ------------------------------------------------------------------ laid weights


def test_a_codebook_is_trained_with_the_sum_over_each_cluster() -> None:
    """Deep Compression, section 3: the gradient of an entry is that of all its weights."""
    model = network()
    lay(model, "0.weight", KMeans(2))
    layer, latent = laid_tensors(model)["0.weight"]
    before, kept = layer.codebook.detach().clone(), latent.detach().clone()
    plain = copy.deepcopy(model)
    bake(plain)
    slope = gradient(plain, task(), ["0.weight"])["0.weight"]
    trained(Train(**ONE, scope="0", optimizer=plain_sgd()), model)
    sums = torch.zeros(4).index_add_(0, layer.index.long().flatten(), slope.flatten())
    assert torch.allclose(layer.codebook, before - 0.1 * sums, atol=1e-6)
    assert torch.equal(latent, kept)


@pytest.mark.parametrize(
    "representation",
    [Ternary(), Binary(), Symmetric(4, rounding="stochastic"), KMeans(3)],
    ids=repr,
)
def test_what_is_trained_is_what_ships(representation: Any) -> None:
    """Hazards 2, 8 and 12: no stale cache, no -0.0, and a pruned weight never revives."""
    model = network()
    run_step(Prune("weights", keep=0.5), State(model))
    run_step(Quantize(representation), State(model))
    trained(Train(epochs=3, batch=BATCH, optimizer=AdamW(0.05), penalty=L1(1e-3)), model)
    for name, (layer, latent) in laid_tensors(model).items():
        used = model.get_submodule(name.removesuffix(".weight")).weight.detach()
        shipped = layer.representation.decode(layer.encode(latent))
        assert torch.equal(used.view(torch.int32), shipped.view(torch.int32)), name
        assert not bool(used[~layer.mask].any())
        assert not bool(((used == 0) & used.signbit()).any())


def test_training_reads_the_weights_as_they_are_now() -> None:
    """Hazard 2: with the cache of torch's parametrize around it, a second update would not."""
    model, twin = network(), network()
    for each in (model, twin):
        lay(each, "0.weight", Ternary())
    train = constant(3, Stop(keep="last"))
    made = lambda groups: torch.optim.SGD(groups, lr=0.1)  # noqa: E731
    assert same(trained(train, model), by_hand(train, twin, task(), made))
    assert not torch.equal(laid_tensors(model)["0.weight"][1], network()[0].weight)


def test_noise_is_drawn_anew_after_every_update_once_and_in_the_scope_alone() -> None:
    model = Tied()
    for name in ("first.weight", "last.weight"):
        lay(model, name, Symmetric(4, rounding="stochastic"))
    before = {name: int(layer.noise) for name, (layer, _) in laid_tensors(model).items()}
    trained(Train(scope="first, second", epochs=2, batch=BATCH, stop=Stop(keep="last")), model)
    after = {
        name: int(layer.noise) - before[name] for name, (layer, _) in laid_tensors(model).items()
    }
    assert after == {"first.weight": 6, "second.weight": 6, "last.weight": 0}


def test_a_kind_finds_its_modules_though_they_are_laid() -> None:
    """Hazard 10: the type of a laid module is another."""
    model = network()
    lay(model, "2.weight", Symmetric(8))
    before = laid_tensors(model)["2.weight"][1].detach().clone()
    trained(Train(scope="kind:linear", batch=BATCH), model)
    assert not torch.equal(laid_tensors(model)["2.weight"][1], before)


def test_bfloat16_trains_numbers_that_stay_float32() -> None:
    """Hazard 13: autocast is for forwards in training; scores and weights are float32."""
    states = [State(network(), task(), precision=p) for p in ("float32", "bfloat16")]
    seen: list[torch.dtype] = []
    for state in states:
        lay(state.model, "0.weight", Ternary())
        state.model[2].register_forward_hook(lambda m, i, output: seen.append(output.dtype))  # type: ignore[index, operator]
        run_step(Train(epochs=2, batch=BATCH), state)
    assert {tensor.dtype for tensor in states[1].model.parameters()} == {torch.float32}
    half = len(seen) // 2
    assert set(seen[:half]) == {torch.float32}
    assert set(seen[half:]) == {torch.bfloat16, torch.float32}
    assert not same(states[0].model, states[1].model)
    layer, latent = laid_tensors(states[1].model)["0.weight"]
    assert torch.equal(layer(latent), layer.representation.decode(layer.encode(latent)))


# ------------------------------------------------------------------ data, errors, progress


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"drop_last": True, "batch_size": 7}])
def test_a_users_loader_decides_the_batches(options: dict[str, Any]) -> None:
    """The step's ``batch`` does not count: the decay must know how many updates there are."""
    source = task()
    pairs = TensorDataset(source.train.inputs, source.train.labels)  # type: ignore[attr-defined]
    held = (source.test.inputs, source.test.labels)  # type: ignore[attr-defined]
    loader = DataLoader(pairs, **{"batch_size": 5, **options})
    reporter = Reporter()
    with reporting(reporter):
        model = trained(
            Train(epochs=2, batch=128, optimizer=plain_sgd(decay=Linear())),
            data=Task(loader, held, held),
        )
    assert reporter.total == reporter.done == 2 * len(loader)
    assert not same(model, network())


class Reporter:
    """Counts what a progress bar would show."""

    total: int | None = None
    done = 0

    def start(self, label: str, total: int | None) -> int:
        if "train" in label:
            self.total = total
        return int("train" in label)

    def advance(self, handle: int) -> None:
        self.done += handle

    def stop(self, handle: int) -> None: ...


def test_a_task_is_needed() -> None:
    with pytest.raises(TaskError, match="train needs data, and there is no task"):
        Train().check(network(), None)
    with pytest.raises(TaskError, match="train needs data, and there is no task"):
        run_step(Train(), State(network()))


def test_what_runs_during_is_checked_too() -> None:
    with pytest.raises(ScopeError, match="'1' selects no weight"):
        Train(during=(Prune("weights", scope="1", keep=0.5),)).check(network(), task())
    prunes = (Prune("weights", keep=0.25), Prune("weights", keep=0.5))
    with pytest.raises(ChainError, match=r"keep 0\.5 after an earlier prune"):
        Train(during=prunes).check(network(), task())


@pytest.mark.parametrize("step", [Train(), Quantize(4)], ids=repr)
def test_only_what_may_run_during_may(step: Step) -> None:
    with pytest.raises(RecipeError, match="during"):
        Train(during=(step,))  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_stops_the_training_and_says_what_to_do() -> None:
    with pytest.raises(RunError, match=r"the loss is (nan|inf) at epoch \d+, batch \d+") as caught:
        trained(Train(epochs=20, batch=BATCH, optimizer=plain_sgd(1e30)))
    assert "lower the learning rate (1e+30) or clip the gradient" in str(caught.value)


def test_a_network_broken_by_the_last_update_is_not_returned() -> None:
    with pytest.raises(RunError, match="on the validation split after epoch 1; lower"):
        trained(Train(batch=FULL, optimizer=plain_sgd(1e38)))


@pytest.mark.parametrize("fields", [{"epochs": 0}, {"batch": 0}, {"optimizer": {"sgd": -1}}])
def test_fields_out_of_bounds_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(fields))):
        Train(**fields)


# ------------------------------------------------------------------ going on


class Keep:
    """Notes what a training would write, at every chance."""

    def __init__(self) -> None:
        self.payloads: list[dict[str, Any]] = []

    def due(self) -> bool:
        return True

    def write(self, state: State, training: dict[str, Any]) -> None:
        self.payloads.append(training)


def test_it_offers_to_write_after_every_update_and_epoch() -> None:
    keeper = Keep()
    run_step(Train(epochs=2, batch=BATCH), State(network(), task(), keeper=keeper))
    stood = [(p["counters"]["epoch"], p["counters"]["batch"]) for p in keeper.payloads]
    assert stood == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]


def moments(loop: _Loop, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: slots for parameter, slots in loop.descent.optimizer.state.items()
    }


@pytest.mark.parametrize("optimizer", [Adam(0.01), AdamW(0.01), SGD(0.1), plain_sgd()], ids=repr)
def test_moments_go_back_to_their_parameters(optimizer: Any, tmp_path: Path) -> None:
    """A mask is laid on the way, which moves a weight to another name and place."""
    train = Train(
        epochs=2, batch=BATCH, optimizer=optimizer, during=(Prune("weights", scope="2", keep=0.5),)
    )
    state = State(network(), task())
    lay(state.model, "0.weight", KMeans(2))
    loop = _Loop(train, state)
    for batch in itertools.islice(loop.batches(), 4):
        loop.update(batch)
    save_checkpoint(state, loop.payload(), tmp_path / "checkpoint", run={})
    other = State(network(), task())
    load_checkpoint(other, tmp_path / "checkpoint")
    resumed = _Loop(train, other)
    assert other.training == {}
    before, after = moments(loop, state.model), moments(resumed, other.model)
    assert before.keys() == after.keys()
    assert len(before) == (0 if optimizer == plain_sgd() else 4)  # 0.weight itself has no gradient
    for name, slots in before.items():
        assert slots.keys() == after[name].keys()
        assert all(torch.equal(torch.as_tensor(slots[key]), after[name][key]) for key in slots)
    assert same(state.model, other.model)


def test_the_best_epoch_is_written_and_found_again(tmp_path: Path) -> None:
    state = State(network(), scored(0.1, 0.9, 0.2))
    loop = _Loop(constant(3, Stop(patience=5)), state)
    for batch in loop.batches():
        loop.update(batch)
    save_checkpoint(state, loop.payload(), tmp_path / "checkpoint", run={})
    other = State(network(), task())
    load_checkpoint(other, tmp_path / "checkpoint")
    resumed = _Loop(constant(3, Stop(patience=5)), other)
    assert resumed.best_score == loop.best_score and resumed.best_score is not None
    assert resumed.best_score[0] == 0.9 and resumed.stale == 1
    assert resumed.best.keys() == loop.best.keys()
    assert all(torch.equal(resumed.best[name], loop.best[name]) for name in loop.best)
    resumed.run()
    loop.model.load_state_dict(loop.best)
    assert same(other.model, loop.model)


def test_the_objective_is_weighed() -> None:
    doubled = Train(Label(weight=2.0), **ONE, optimizer=plain_sgd(0.05))
    assert same(trained(doubled), trained(Train(**ONE, optimizer=plain_sgd(0.1))))


def test_scopes_and_fields_are_written_shortly() -> None:
    assert repr(Train(epochs=2, scope=Scope("fc"))) == "Train(scope=Scope('fc'), epochs=2)"


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_updates_are_fused_only_where_numbers_lie_in_their_order(kind: type[Adam]) -> None:
    rows = nn.Conv2d(2, 4, 3)
    channels = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
    for model, fused in ((rows, True), (channels, False)):
        assert kind().build(model.parameters()).defaults["fused"] is fused


def test_moments_of_other_parameters_are_refused() -> None:
    def loop(width: int) -> _Loop:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 10))
        return _Loop(Train(optimizer=AdamW()), State(model, digits()))

    first = loop(4)
    first.update(next(first.task.train.batches(8)))
    with pytest.raises(RunError, match="moments in the checkpoint are not those"):
        loop(6).restore(first.payload())
