"""Mixed precision: the blocks that the loss curves most in get the larger representation."""

from __future__ import annotations

import logging
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from laconic.errors import ChainError, ModelError, ScopeError, TaskError
from laconic.recipe import Recipe
from laconic.recover import SGD, LeastSquares, Reconstruct, Train
from laconic.run import compress
from laconic.step import State, Step, run_step
from laconic.structure import Fold, Split
from laconic.tasks import Task
from laconic.weights import (
    Binary,
    FixedPoint,
    Float,
    KMeans,
    LossAware,
    MixedPrecision,
    QuantNoise,
    Representation,
    Symmetric,
    Ternary,
    lay,
)
from laconic.weights.laid import laid_tensors, latent_of
from laconic.weights.mixed import blocks_of, most_sensitive

# Power iteration stops when the eigenvalue changes by less.
CLOSE = 1e-3


class Bowls(nn.Module):
    """A sum of quadratics: the Hessian of block i is ``sharpness_i * input^2`` times I."""

    def __init__(self, *sharpness: float) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.layers = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(3, 2, bias=False)}) for _ in sharpness
        )

    def forward(self, inputs: Tensor) -> Tensor:
        terms = [
            0.5 * sharp * layer["fc"].weight.square().sum()  # type: ignore[index, operator]
            for sharp, layer in zip(self.sharpness, self.layers, strict=True)
        ]
        return inputs**2 * torch.stack(terms).sum()


def bowls_task(values: Tensor | None = None) -> Task:
    inputs = torch.full((8, 1), 1.0) if values is None else values
    return Task(
        (inputs, torch.zeros(len(inputs))),
        (inputs, torch.zeros(len(inputs))),
        (inputs, torch.zeros(len(inputs))),
        loss=lambda outputs, batch: outputs.mean(),
        metrics={"low": lambda outputs, targets: -float(outputs.mean())},
    )


def representations(model: nn.Module) -> dict[str, object]:
    return {name: layer.representation for name, (layer, _) in laid_tensors(model).items()}


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.5, 2), (0.75, 3), (0.99, 3)])
def test_each_representation_is_given_to_someone(share: float, count: int) -> None:
    found = most_sensitive({"a": 1.0, "b": 1.0, "c": 4.0, "d": 1.0}, share)
    assert found == ["c", "a", "b", "d"][:count]


def test_eigenvalues_of_known_curvature() -> None:
    """One batch holds 1s and one 2s: curvatures of sharpness times 1 and times 4."""
    values = torch.tensor([[1.0], [2.0]])
    state = State(Bowls(2.0, -6.0), bowls_task(values))
    step = MixedPrecision(batches=2, batch=1)
    blocks = blocks_of(state.model, [f"layers.{place}.fc.weight" for place in range(2)])
    found = step.sensitivities(state, blocks)
    # 2 (1 + 4) / 2 + 2 * 3 / 2, and three times that.
    assert found == pytest.approx({"layers.0": 8.0, "layers.1": 24.0}, rel=CLOSE)


def test_the_most_curved_blocks_get_more_bits(caplog: pytest.LogCaptureFixture) -> None:
    state = State(Bowls(1.0, 9.0, 0.1, 4.0), bowls_task())
    step = MixedPrecision(2, 8, share=0.5, batches=1)
    step.check(state.model, state.task)
    with caplog.at_level(logging.INFO, "laconic.weights.mixed"):
        run_step(step, state)
    found = representations(state.model)
    assert [found[f"layers.{place}.fc.weight"] for place in range(4)] == [
        Symmetric(2), Symmetric(8), Symmetric(2), Symmetric(8),
    ]  # fmt: skip
    assert caplog.messages[1] == "mixed_precision: layers.1: sensitivity 9, high"
    assert len(caplog.messages) == 4


def test_masks_stay_and_choices_of_a_scope_are_shared() -> None:
    network = Bowls(1.0, 9.0, 4.0)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    lay(network, "layers.0.fc.weight", Float(), mask=mask)
    with torch.no_grad():
        latent_of(network, "layers.0.fc.weight")[1].fill_(0.3)
        network.get_parameter("layers.2.fc.weight").fill_(5.0)
    run_step(
        MixedPrecision(FixedPoint(8), Binary(), share=0.3, batches=1), State(network, bowls_task())
    )
    assert torch.equal(network.layers[0]["fc"].weight != 0, mask)  # type: ignore[index]
    found = representations(network)
    shared = FixedPoint(8, fraction=4)  # 5.0 needs three integer bits
    assert list(found.values()) == [shared, Binary(), shared]


@pytest.mark.parametrize("laid", [False, True])
def test_the_network_is_left_as_found_while_it_is_measured(laid: bool, tiny_mlp: nn.Module) -> None:
    if laid:
        lay(tiny_mlp, "0.weight", Symmetric(4))
    tiny_mlp.train()
    parameter = tiny_mlp[2].weight  # type: ignore[index]
    parameter.grad = torch.ones_like(parameter)  # type: ignore[assignment, arg-type]
    before = {name: tensor.clone() for name, tensor in tiny_mlp.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(12, 6, generator=generator), torch.arange(12) % 3
    state = State(tiny_mlp, Task(pair, pair, pair))
    standing = torch.random.get_rng_state()
    step = MixedPrecision(batches=2, batch=6)
    blocks = blocks_of(tiny_mlp, ["0.weight", "2.weight"])
    found = step.sensitivities(state, blocks)
    assert step.sensitivities(state, blocks) == found
    assert torch.equal(torch.random.get_rng_state(), standing)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_mlp.state_dict().items())
    assert tiny_mlp.training
    assert parameter.grad is not None and bool((parameter.grad == 1).all())


def test_blocks_are_layers_and_other_modules_stand_alone() -> None:
    transformers: ModuleType = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12
    )
    network = transformers.BertForSequenceClassification(config)
    names = [name for name, tensor in network.named_parameters() if tensor.dim() == 2]
    blocks = blocks_of(network, names)
    assert len(blocks["bert.encoder.layer.1"]) == 6
    assert blocks["classifier"] == ["classifier.weight"]
    assert list(blocks_of(nn.Sequential(nn.Linear(2, 2)), ["0.weight"])) == ["0"]


def test_a_transformer_with_fused_attention() -> None:
    """Its kernels have no second derivative; the plain ones have."""
    transformers: ModuleType = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        vocab_size=20, num_labels=2, attn_implementation="sdpa",
    )  # fmt: skip
    network = transformers.BertForSequenceClassification(config)
    tokens = torch.randint(20, (8, 5), generator=torch.Generator().manual_seed(0))
    pair = tokens, torch.arange(8) % 2
    step = MixedPrecision(batches=1, batch=8, iterations=3, scope="bert.encoder.*")
    state = State(network, Task(pair, pair, pair))
    run_step(step, state)
    assert len(laid_tensors(state.model)) == 12


def test_refusals(tiny_mlp: nn.Module, tiny_cnn: nn.Module) -> None:
    task = bowls_task()
    with pytest.raises(TaskError, match="mixed_precision needs batches, and there is no task"):
        MixedPrecision().check(tiny_mlp, None)
    with pytest.raises(ScopeError, match="selects no weight"):
        MixedPrecision(scope="kind:norm").check(tiny_cnn, task)
    with pytest.raises(ScopeError, match="selects one block, '0', and there is nothing to mix"):
        MixedPrecision(scope="0").check(tiny_mlp, task)


def test_a_loss_that_is_no_number_is_refused() -> None:
    state = State(Bowls(1.0, 2.0), bowls_task(torch.full((8, 1), 1e30)))
    with pytest.raises(ModelError, match=r"'layers\.0' is not finite"):
        run_step(MixedPrecision(batches=1), state)
    assert not laid_tensors(state.model)


# ------------------------------------------------------------------ what later steps know of it


def normalised() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()


def examples() -> Task:
    pair = (torch.rand(24, 4), torch.arange(24) % 3)
    return Task(pair, pair, pair)


LATER: dict[str, tuple[Representation, Step, str]] = {
    "an optimiser without curvature": (LossAware(), Train(optimizer=SGD(0.1)), "use adam or adamw"),
    "noise after fixed codes": (KMeans(2), QuantNoise(retrain=Train()), "the codes are fixed"),
    "an exact solution": (Symmetric(2), Reconstruct(solve=LeastSquares()), "rounding would undo"),
    "folding": (Symmetric(2), Fold(), "the codes would change"),
}


@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize("first", [True, False])
def test_a_recipe_knows_before_it_runs_what_mixed_precision_lays(name: str, first: bool) -> None:
    kind, later, reason = LATER[name]
    pair = (kind, Symmetric(4)) if first else (Symmetric(4), kind)
    with pytest.raises(ChainError, match=reason):
        Recipe([MixedPrecision(*pair), later]).check(normalised(), examples())


@pytest.mark.parametrize("later", [QuantNoise(retrain=Train()), Split()], ids=["noise", "split"])
def test_a_recipe_goes_on_with_what_mixed_precision_lays(later: Step) -> None:
    mixed = MixedPrecision(Symmetric(4), Ternary(), batches=1, batch=8, scope="kind:linear")
    assert compress(normalised(), examples(), [mixed, later]).history[-1].step == later.name
