"""Criteria of axes: scores of channels, heads and neurons of known networks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.criteria import classification, linear, network, regression
from laconic.errors import AxisError, ModelError, RecipeError
from laconic.scope import Scope
from laconic.step import State
from laconic.structure.axes import Axis, Use, permute_
from laconic.structure.criteria import Criterion, Hessian, Magnitude, Random, Taylor
from laconic.structure.elements import axes_of, matrices
from laconic.structure.importance import FPGM, BatchNormScale, HeadImportance, NeuronImportance
from laconic.tasks.task import Task
from laconic.weights.laid import lay
from laconic.weights.representation import Float

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
