"""Criteria: scores of known networks, and that scoring leaves the network alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laconic.errors import AxisError, ModelError, RecipeError, TaskError
from laconic.scope import Scope
from laconic.step import State, members
from laconic.structure.axes import Axis, Use, permute_
from laconic.structure.criteria import (
    Criterion,
    Hessian,
    Magnitude,
    Random,
    Taylor,
    standardized,
)
from laconic.structure.elements import axes_of, matrices
from laconic.structure.importance import (
    FPGM,
    BatchNormScale,
    HeadImportance,
    NeuronImportance,
)
from laconic.tasks.split import Arrays, Batch
from laconic.tasks.task import Task
from laconic.weights.codebook import KMeans
from laconic.weights.laid import bake, lay, weights_of
from laconic.weights.representation import Float

DATA = [Taylor(), Taylor(per="sample"), Hessian(), Hessian(estimator="hutchinson")]
EVERY = [Magnitude(), Magnitude("std"), Random(), *DATA]


def mean_square(outputs: Tensor, batch: Batch) -> Tensor:
    """Return half the mean squared error: its Hessian is the inputs' second moment."""
    return 0.5 * (outputs - batch.targets).square().sum(-1).mean()


def regression(examples: int = 24, width: int = 3, augment: object = None) -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, width, generator=generator)
    targets = torch.randn(examples, 2, generator=generator)
    data = Arrays(inputs, targets, augment=augment)  # type: ignore[arg-type]
    rest = (inputs, targets)
    return Task(data, rest, rest, loss=mean_square, metrics={"loss": lambda o, t: 0.0})


def classification() -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 1, 6, 6, generator=generator)
    pair = (inputs, torch.arange(40) % 3)
    return Task(pair, pair, pair)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(64, 3),
    )


def scored(criterion: Criterion, state: State) -> dict[str, Tensor]:
    return criterion.scores(state, weights_of(state.model, Scope("*")))


def linear(width: int = 3) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(width, 2, bias=False)


@pytest.mark.parametrize("criterion", EVERY, ids=repr)
def test_one_finite_score_per_weight_the_same_each_time(criterion: Criterion) -> None:
    state = State(network(), classification(), seed=3)
    first, second = scored(criterion, state), scored(criterion, state)
    assert {name: score.shape for name, score in first.items()} == {
        "0.weight": (4, 1, 3, 3),
        "5.weight": (3, 64),
    }
    for name, score in first.items():
        assert torch.equal(score, second[name])
        assert bool(torch.isfinite(score).all())
        assert float(score.std()) > 0
        assert not score.requires_grad


@pytest.mark.parametrize("criterion", EVERY, ids=repr)
def test_scoring_leaves_the_network_as_it_was(criterion: Criterion) -> None:
    model, task = network(), classification()
    lay(model, "5.weight", KMeans(3), mask=torch.arange(192).reshape(3, 64) % 2 == 0)
    model.train()
    model[2].eval()
    model[0].weight.grad = torch.full((4, 1, 3, 3), 7.0)
    model[0].bias.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    weight = model[5].weight.detach().clone()
    torch.manual_seed(9)
    scored(criterion, State(model, task))
    drawn = torch.rand(1)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    assert torch.equal(model[0].weight.grad, torch.full((4, 1, 3, 3), 7.0))
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["0.weight"]
    assert torch.equal(model[5].weight, weight)
    torch.manual_seed(9)
    assert torch.equal(drawn, torch.rand(1))


def test_magnitude() -> None:
    model = linear(2)
    model.weight.data = torch.tensor([[3.0, -4.0], [0.0, 0.5]])
    assert scored(Magnitude(), State(model))["weight"].tolist() == [[3.0, 4.0], [0.0, 0.5]]


def test_standardized_magnitude_looks_at_survivors_alone() -> None:
    model = nn.Sequential(linear())
    mask = torch.tensor([[True, True, False], [True, True, False]])
    lay(model, "0.weight", Float(), mask=mask)
    score = scored(Magnitude("std"), State(model))["0.weight"]
    kept = model[0].weight.detach()[mask]
    assert torch.allclose(score[mask], kept.abs() / kept.std(correction=0))
    assert score[~mask].tolist() == [0.0, 0.0]


def test_layers_without_spread_or_survivors_have_finite_scores() -> None:
    equal = standardized(torch.full((4,), 1e6))
    assert bool(torch.isfinite(equal).all())
    assert float(equal.min()) > 1e30
    assert standardized(torch.zeros(3), torch.zeros(3, dtype=torch.bool)).tolist() == [0, 0, 0]
    assert standardized(torch.tensor([0.0, 5.0]), torch.tensor([False, True]))[0] == 0


def test_random_depends_on_seed_and_name_alone() -> None:
    model = network()
    weights = weights_of(model, Scope("*"))
    twins = Random().scores(State(model), {"5.weight": torch.zeros(9), "0.weight": torch.zeros(9)})
    assert not torch.equal(*twins.values())
    every = Random().scores(State(model, seed=1), weights)
    alone = Random().scores(State(model, seed=1), {"5.weight": weights["5.weight"]})
    other = Random().scores(State(model, seed=2), weights)
    assert torch.equal(every["5.weight"], alone["5.weight"])
    assert not torch.equal(every["5.weight"], other["5.weight"])
    assert 0 <= float(every["5.weight"].min()) < 0.1 < 0.9 < float(every["5.weight"].max()) <= 1


def batch_gradients(model: nn.Module, task: Task, seed: int, size: int) -> list[Tensor]:
    """Return dl/dW [2, width] of each batch, from the formula (W x - y) x^T."""
    weight = model.weight.detach()
    found = []
    for batch in task.train.batches(size, seed=seed):
        x = batch.inputs[0]
        found.append((x @ weight.T - batch.targets).T @ x / len(x))
    return found


def test_taylor_averages_the_absolute_value_over_batches_or_samples() -> None:
    model, task = linear(), regression()
    state = State(model, task, seed=4)
    for criterion, size in ((Taylor(batch=8), 8), (Taylor(batch=8, per="sample"), 1)):
        slopes = batch_gradients(model, task, 4, size)
        wanted = torch.stack([(g * model.weight.detach()).abs() for g in slopes]).mean(0)
        assert torch.allclose(scored(criterion, state)["weight"], wanted, rtol=1e-5)
    one = scored(Taylor(batches=1, batch=8), state)["weight"]
    first = batch_gradients(model, task, 4, 8)[0]
    assert torch.allclose(one, (first * model.weight.detach()).abs(), rtol=1e-5)


def test_hessian_by_fisher_is_half_the_mean_squared_gradient_times_the_square() -> None:
    model, task = linear(), regression()
    found = scored(Hessian(batch=8), State(model, task, seed=4))["weight"]
    fisher = torch.stack([g**2 for g in batch_gradients(model, task, 4, 1)]).mean(0)
    assert torch.allclose(found, 0.5 * fisher * model.weight.detach() ** 2, rtol=1e-5)


def test_hessian_by_hutchinson_is_exact_where_features_do_not_overlap() -> None:
    inputs = torch.eye(3).repeat(4, 1) * torch.tensor([1.0, 2.0, 3.0])
    pair = (inputs, torch.zeros(12, 2))
    task = Task(pair, pair, pair, loss=mean_square, metrics={"loss": lambda o, t: 0.0})
    model = linear()
    found = scored(Hessian(batch=12, estimator="hutchinson"), State(model, task))["weight"]
    diagonal = (inputs**2).mean(0).expand(2, 3)
    assert torch.allclose(found, 0.5 * diagonal * model.weight.detach() ** 2, rtol=1e-5)


def test_more_vectors_bring_hutchinson_closer_to_the_true_diagonal() -> None:
    model, task = linear(), regression()
    second_moment = (task.train.inputs**2).mean(0).expand(2, 3)
    exact = 0.5 * second_moment * model.weight.detach() ** 2
    errors = []
    for vectors in (1, 64):
        criterion = Hessian(batch=24, estimator="hutchinson", vectors=vectors)
        errors.append(float((scored(criterion, State(model, task))["weight"] - exact).abs().max()))
    assert errors[1] < errors[0] / 3


class Tied(nn.Module):
    """Two linears that share one weight, as a decoder shares an embedding's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("representation", [None, Float(), KMeans(1)])
@pytest.mark.parametrize("criterion", DATA, ids=repr)
def test_laid_and_tied_weights_score_like_the_plain_network(
    representation: object, criterion: Criterion
) -> None:
    model, task = Tied(), regression(width=2)
    if representation is not None:
        mask = torch.tensor([[True, True], [True, False]])
        lay(model, "first.weight", representation, mask=mask)
    plain = Tied()
    plain.first.weight.data = model.first.weight.detach().clone()
    assert plain.second.weight is plain.first.weight
    wanted = scored(criterion, State(plain, task))["first.weight"]
    found = scored(criterion, State(model, task))["first.weight"]
    assert torch.equal(found, wanted)
    assert float(found.abs().max()) > 0


def test_gradient_of_a_tied_weight_sums_over_its_uses() -> None:
    model, task = Tied(), regression(width=2)
    lay(model, "first.weight", KMeans(2))
    found = scored(Taylor(batches=1, batch=24), State(model, task))["first.weight"]
    bake(model)
    batch = next(task.train.batches(24, seed=0))
    mean_square(model(batch.inputs[0]), batch).backward()
    assert torch.equal(found, (model.first.weight.grad * model.first.weight).abs().detach())


def test_pruned_weights_score_zero() -> None:
    model = nn.Sequential(linear())
    mask = torch.tensor([[True, True, False], [True, False, True]])
    lay(model, "0.weight", Float(), mask=mask)
    for criterion in (Magnitude(), Magnitude("std"), *DATA):
        score = scored(criterion, State(model, regression()))["0.weight"]
        assert score[~mask].tolist() == [0.0, 0.0]
        assert float(score[mask].abs().min()) > 0


def test_frozen_and_unused_weights_are_scored_too() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = linear(), linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Half().requires_grad_(False)
    with torch.no_grad():
        found = scored(Taylor(), State(model, regression()))
    assert float(found["used.weight"].min()) > 0
    assert torch.equal(found["unused.weight"], torch.zeros(2, 3))


def test_batches_are_not_augmented() -> None:
    plain = scored(Taylor(), State(linear(), regression()))["weight"]
    task = regression(augment=lambda inputs, generator: inputs + 1000.0)
    assert torch.equal(scored(Taylor(), State(linear(), task))["weight"], plain)


def test_samples_are_single_examples_whatever_the_loader_yields() -> None:
    task = regression()
    data = TensorDataset(task.train.inputs, task.train.labels)
    loader = DataLoader(data, batch_size=6)
    loaded = Task(loader, loader, loader, loss=mean_square, metrics={"loss": lambda o, t: 0.0})
    for criterion in (Taylor(per="sample"), Hessian()):
        found = scored(criterion, State(linear(), loaded))["weight"]
        wanted = scored(criterion, State(linear(), task))["weight"]
        assert torch.allclose(found, wanted, rtol=1e-5)


def test_named_inputs_without_targets_are_split_too() -> None:
    task = regression()
    state = State(linear(), task)
    wanted = scored(Taylor(per="sample"), state)["weight"]

    def loss(outputs: Tensor, batch: Batch) -> Tensor:
        return 0.5 * (outputs - batch.inputs["y"]).square().sum(-1).mean()

    pairs = [{"x": x, "y": y} for x, y in zip(task.train.inputs, task.train.labels, strict=True)]
    loader = DataLoader(pairs, batch_size=8)  # type: ignore[arg-type]
    state.task = Task(
        loader,
        task.test,
        task.test,
        call=lambda model, batch: model(batch.inputs["x"]),
        loss=loss,
        metrics={"loss": lambda o, t: 0.0},
    )
    assert torch.allclose(scored(Taylor(per="sample"), state)["weight"], wanted, rtol=1e-5)


@pytest.mark.parametrize("criterion", DATA, ids=repr)
def test_what_looks_at_data_needs_a_task(criterion: Criterion) -> None:
    with pytest.raises(TaskError, match=f"{criterion.name} needs batches"):
        criterion.check(None)
    with pytest.raises(TaskError, match=f"{criterion.name} needs batches"):
        scored(criterion, State(linear()))
    criterion.check(regression())


@pytest.mark.parametrize("criterion", [Magnitude(), Random()])
def test_what_looks_at_weights_needs_no_task(criterion: Criterion) -> None:
    criterion.check(None)
    assert scored(criterion, State(linear()))["weight"].shape == (2, 3)


@pytest.mark.parametrize("criterion", DATA, ids=repr)
def test_a_loss_that_is_not_finite_is_refused(criterion: Criterion) -> None:
    task = regression()
    task.loss = lambda outputs, batch: mean_square(outputs, batch) * math.inf
    with pytest.raises(ModelError, match="'weight' is not finite"):
        scored(criterion, State(linear(), task))


def test_a_parametrization_of_others_is_refused() -> None:
    model = nn.utils.parametrizations.weight_norm(linear())
    with pytest.raises(ModelError, match="not laconic's"):
        Taylor().scores(State(model, regression()), {"weight": model.weight})


def test_attention_layers_can_be_scored_by_curvature() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.query, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            q = self.query(x)[:, None]
            return self.out(F.scaled_dot_product_attention(q, q, q)[:, 0])

    found = scored(Hessian(batches=2, estimator="hutchinson"), State(Attention(), regression()))
    assert float(found["out.weight"].abs().max()) > 0


def test_recipe_forms() -> None:
    adapter = TypeAdapter(Criterion)
    assert adapter.validate_python("magnitude") == Magnitude()
    assert adapter.validate_python({"magnitude": "std"}) == Magnitude(normalize="std")
    for criterion in EVERY:
        assert adapter.validate_python(criterion.to_data()) == criterion
        assert hash(criterion) == hash(adapter.validate_python(criterion.to_data()))
    assert {"magnitude", "taylor", "hessian", "random"} <= set(members(Criterion))
    with pytest.raises(RecipeError, match="batches"):
        Taylor(batches=0)
    with pytest.raises(RecipeError, match="estimator"):
        Hessian(estimator="exact")  # type: ignore[arg-type]


# ------------------------------------------------------------------ elements of axes

# The gradient of a gate is a sum of other products than that of the weights behind it.
GATE = 1e-6
SAMPLED = [
    Taylor(batch=8),
    Taylor(batch=8, per="sample", combine="absolute", uses="produced"),
    Taylor(batch=8, combine="square", uses="both"),
    Hessian(batch=8),
    Hessian(batch=8, estimator="hutchinson", vectors=2),
]
CHANNELS = [
    *SAMPLED,
    Magnitude(),
    Magnitude("std", norm=2),
    Magnitude("size", norm=2, uses="consumed"),
    Random(),
    BatchNormScale(),
    FPGM(),
]


def channels(model: nn.Module, task: Task) -> list[Axis]:
    return axes_of(model, task, "channels", Scope("*"))


@pytest.mark.parametrize("criterion", CHANNELS, ids=repr)
def test_one_finite_score_per_element_and_the_network_as_it_was(criterion: Criterion) -> None:
    model, task = network(), classification()
    model[1].weight.data.copy_(torch.tensor([0.5, -2.0, 1.0, 0.1]))
    lay(model, "5.weight", Float(), mask=torch.arange(192).reshape(3, 64) % 2 == 0)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    axes = channels(model, task)
    criterion.check(task, "channels")
    criterion.check_axes(model, axes)
    torch.manual_seed(9)
    first = criterion.axis_scores(State(model, task, seed=3), axes)
    drawn = torch.rand(1)
    second = criterion.axis_scores(State(model, task, seed=3), axes)
    assert [score.shape for score in first.values()] == [(4,)]
    for axis, score in first.items():
        assert torch.equal(score, second[axis]) and not score.requires_grad
        assert bool(score.isfinite().all()) and float(score.std()) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(tensor.grad is None for tensor in model.parameters())
    torch.manual_seed(9)
    assert torch.equal(drawn, torch.rand(1))


def test_magnitude_of_an_element_is_the_norm_of_its_weights() -> None:
    model, task = network(), classification()
    (axis,) = channels(model, task)
    state = State(model, task)
    filters, readers = model[0].weight.detach().flatten(1), model[5].weight.detach()
    columns = readers.reshape(3, 4, 16).movedim(1, 0).flatten(1)
    for criterion, wanted in (
        (Magnitude(), filters.abs().sum(1)),
        (Magnitude(norm=2), filters.norm(dim=1)),
        (Magnitude("size", norm=2), filters.norm(dim=1) / 3),
        (Magnitude("std"), (filters / filters.std(correction=0)).abs().sum(1)),
        (Magnitude(uses="consumed"), columns.abs().sum(1)),
        (Magnitude(uses="both"), filters.abs().sum(1) + columns.abs().sum(1)),
    ):
        assert torch.allclose(criterion.axis_scores(state, [axis])[axis], wanted), criterion


def test_groups_of_a_criterion_add_up_its_weights() -> None:
    model, task = network(), classification()
    (axis,) = channels(model, task)
    state = State(model, task, seed=2)
    for criterion, which in (
        (Taylor(batches=2, combine="absolute", uses="produced"), "produced"),
        (Hessian(batches=1, uses="consumed"), "consumed"),
    ):
        weights = {use.name: use for use in matrices(model, axis, which)}  # type: ignore[arg-type]
        single = criterion.scores(state, {name: model.get_parameter(name) for name in weights})
        wanted = sum(use.rows(single[name]).sum(1) for name, use in weights.items())
        assert torch.allclose(criterion.axis_scores(state, [axis])[axis], wanted, rtol=1e-4)


def test_taylor_of_what_reads_a_channel_is_the_gradient_of_its_gate() -> None:
    model, task = network(), classification()
    (axis,) = channels(model, task)
    found = Taylor(batches=2, batch=16, uses="consumed").axis_scores(State(model, task), [axis])
    gates = torch.ones(4, requires_grad=True)
    model[2].register_forward_hook(lambda module, inputs, output: output * gates[:, None, None])
    total = torch.zeros(4)
    for _, batch in zip(range(2), task.train.batches(16, seed=0), strict=False):
        loss = F.cross_entropy(model.eval()(*batch.inputs), batch.targets)
        total += torch.autograd.grad(loss, gates)[0].abs() / 2
    assert torch.allclose(found[axis], total, atol=GATE)


def test_the_sum_of_an_elements_products_is_exact_for_a_linear_loss() -> None:
    task = regression(width=3)
    task.loss = lambda outputs, batch: outputs.sum(-1).mean()
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).requires_grad_(False)
    (axis,) = axes_of(model, task, "neurons", Scope("*"))
    one = Taylor(batches=1, batch=len(task.train), uses="consumed")
    found = one.axis_scores(State(model, task), [axis])[axis]
    batch = task.example_batch(len(task.train))
    before = task.loss(model(*batch.inputs), batch)
    for element in range(4):
        cut = torch.ones(4)
        cut[element] = 0
        after = task.loss(model[1](model[0](*batch.inputs) * cut), batch)
        assert float(found[element]) == pytest.approx(abs(float(after - before)), abs=GATE)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=12,
        num_attention_heads=3,
        num_hidden_layers=2,
        intermediate_size=10,
        max_position_embeddings=8,
        initializer_range=0.5,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


def texts() -> Task:
    generator = torch.Generator().manual_seed(0)
    data = (torch.randint(20, (24, 5), generator=generator), torch.arange(24) % 2)
    return Task(data, data, data, call=lambda model, batch: model(*batch.inputs).logits)


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_head_importance_is_the_product_of_a_heads_output_with_its_gradient(per: str) -> None:
    """I_h = E |Att_h . dL/dAtt_h| (Michel et al. 2019, equation 2)."""
    model, task = bert(), texts()
    heads = axes_of(model, task, "heads", Scope("*"))
    criterion = HeadImportance(batch=8, per=per, normalize="none")  # type: ignore[arg-type]
    found = criterion.axis_scores(State(model, task, seed=5), heads)
    contexts: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].retain_grad()
        contexts.append(inputs[0])

    outputs = [layer.attention.output.dense for layer in model.bert.encoder.layer]
    hooks = [output.register_forward_pre_hook(keep) for output in outputs]
    totals, count = torch.zeros(2, 3), 0
    for batch in task.train.batches(8 if per == "batch" else 1, seed=5):
        contexts.clear()
        F.cross_entropy(task.call(model, batch), batch.targets).backward()
        for place, context in enumerate(contexts):
            product = (context * context.grad).unflatten(-1, (3, 4))
            totals[place] += product.sum((0, 1, 3)).abs()
        count += 1
    assert torch.allclose(torch.stack([*found.values()]), totals / count, atol=GATE)
    for hook in hooks:
        hook.remove()
    layers = HeadImportance(batch=8, per=per).axis_scores(State(model, task, seed=5), heads)  # type: ignore[arg-type]
    for axis in heads:
        assert torch.allclose(layers[axis], found[axis] / found[axis].norm())


def test_permuting_heads_permutes_their_importance() -> None:
    model, task = bert(), texts()
    axes = axes_of(model, task, "heads", Scope("*"))
    criterion, state = HeadImportance(batches=2, batch=8), State(model, task)
    before = criterion.axis_scores(state, axes)
    order = [2, 0, 1]
    permute_(model, axes[1], order)
    after = criterion.axis_scores(state, axes)
    assert torch.allclose(after[axes[1]], before[axes[1]][order], atol=GATE)
    assert torch.allclose(after[axes[0]], before[axes[0]], atol=GATE)


def test_neuron_importance_adds_both_sides_per_batch() -> None:
    """I = E |sum w1 g1 + b g_b| + |sum w2 g2| (Hou et al. 2020)."""
    model, task = bert(), texts()
    layer, total = model.bert.encoder.layer[0], torch.zeros(10)
    inner, outer = layer.intermediate.dense, layer.output.dense
    nn.init.normal_(inner.bias)  # a new one is zero, and its term as well
    axes = axes_of(model, task, "neurons", Scope("*"))
    found = NeuronImportance(batch=8).axis_scores(State(model, task, seed=5), axes)
    for batch in task.train.batches(8, seed=5):
        model.zero_grad()
        F.cross_entropy(task.call(model, batch), batch.targets).backward()
        into = (inner.weight * inner.weight.grad).sum(1) + inner.bias * inner.bias.grad
        total += into.abs() + (outer.weight * outer.weight.grad).sum(0).abs()
    (axis,) = (a for a in axes if a.uses[0].name.startswith("bert.encoder.layer.0."))
    batches = task.train.batch_count(8)
    assert torch.allclose(found[axis], total.detach() / batches, atol=GATE)


def test_batch_norm_scales_are_averaged_where_several_norms_scale_one_axis() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)
            self.m, self.n = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
            self.end = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.end((self.m(self.a(x)) + self.n(self.b(x))).mean((2, 3)))

    model, task = Two(), classification()
    model.m.weight.data, model.n.weight.data = torch.tensor([1.0, -4.0]), torch.tensor([-2.0, 1.0])
    (axis,) = channels(model, task)
    found = BatchNormScale().axis_scores(State(model, task), [axis])
    assert found[axis].tolist() == [1.5, 2.5]


def test_fpgm_prefers_the_filter_far_from_all_others() -> None:
    model, task = network(), classification()
    (axis,) = channels(model, task)
    filters = torch.zeros(4, 1, 3, 3)
    filters[:, 0, 0, 0] = torch.tensor([0.0, 1.0, 3.0, 10.0])
    model[0].weight.data = filters
    found = FPGM().axis_scores(State(model, task), [axis])
    assert found[axis].tolist() == [14.0, 12.0, 12.0, 26.0]


def test_a_gradient_of_an_axis_that_is_not_finite_is_refused() -> None:
    model, task = network(), classification()
    axes = channels(model, task)
    task.loss = lambda outputs, batch: outputs.sum() * math.inf
    with pytest.raises(ModelError, match=r"taylor: .* '5\.weight' is not finite"):
        Taylor().axis_scores(State(model, task), axes)


def test_an_axis_that_no_matrix_reads_has_no_gate() -> None:
    model, task = network(), classification()
    axis = Axis(4, "channel", (Use("0.weight", 0, (4,), 0), Use("1.weight", 0, (4,), 0)))
    with pytest.raises(AxisError, match=r"axis of 4 in '0\.weight'.*: no matrix or kernel reads"):
        Taylor().check_axes(model, [axis])
    found = Taylor(uses="produced").axis_scores(State(model, task), [axis])
    assert float(found[axis].min()) > 0


def test_criteria_of_axes_do_not_score_weights() -> None:
    for criterion in (HeadImportance(), NeuronImportance(), BatchNormScale(), FPGM()):
        with pytest.raises(RecipeError, match=f"{criterion.name} ranks .*, not weights; choose"):
            criterion.scores(State(linear()), {})
