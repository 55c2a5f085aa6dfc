"""Train: the training loop against one by hand, its rates and penalties, data and refusals."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.tensors import same
from helpers.train import (
    BATCH,
    FULL,
    ONE,
    by_hand,
    gradient,
    network,
    plain_sgd,
    seed_of,
    task,
    trained,
    with_norm,
)
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
    Optimizer,
    Stop,
    Train,
)
from laconic.recover.descent import Descent
from laconic.recover.train import _Loop
from laconic.scope import Scope
from laconic.step import State, Step, run_step
from laconic.structure import Prune
from laconic.tasks import Task
from laconic.weights import LearnedStep, Quantize, lay
from laconic.weights.laid import laid_tensors


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


# ------------------------------------------------------------------ against a loop by hand


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


def test_biases_and_norms_of_any_shape_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm([3, 4]))
    descent = Descent(
        AdamW(1e-3, weight_decay=0.5), model, [], networks=[[*model.parameters()]], name="train"
    )
    decaying = [group for group in descent.optimizer.param_groups if group["weight_decay"]]
    assert [group["params"] for group in decaying] == [[model[0].weight]]


@pytest.mark.parametrize("optimizer", [AdamW(0.1, clip=1.0), SGD(0.1)])
def test_a_table_of_sparse_gradients_learns_as_one_of_dense_ones(optimizer: Optimizer) -> None:
    tables = [nn.EmbeddingBag(6, 2, sparse=sparse) for sparse in (True, False)]
    tables[0].load_state_dict(tables[1].state_dict())

    def found(table: nn.Module) -> Tensor:
        return table(torch.tensor([[1, 4]])).square().sum()

    for table in tables:
        descent = Descent(optimizer, table, [""], networks=[[table.weight]], name="train")
        for _ in range(3):
            descent.update(functools.partial(found, table), 0.0, "")
    assert torch.equal(tables[0].weight, tables[1].weight)


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


def test_the_objective_is_weighed() -> None:
    doubled = Train(Label(weight=2.0), **ONE, optimizer=plain_sgd(0.05))
    assert same(trained(doubled), trained(Train(**ONE, optimizer=plain_sgd(0.1))))


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_updates_are_fused_only_where_numbers_lie_in_their_order(kind: type[Adam]) -> None:
    rows = nn.Conv2d(2, 4, 3)
    channels = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
    for model, fused in ((rows, True), (channels, False)):
        assert kind().build(model.parameters()).defaults["fused"] is fused


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


def test_scopes_and_fields_are_written_shortly() -> None:
    assert repr(Train(epochs=2, scope=Scope("fc"))) == "Train(scope=Scope('fc'), epochs=2)"


def test_a_network_that_returns_more_in_training_is_told_to_be_called_otherwise() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Any:
            found = self.inner(x)
            return (found, found) if self.training else found

    with pytest.raises(TaskError, match=r"in training mode the network returns tuple.*give the"):
        trained(Train(**ONE), Auxiliary())
