"""Folding BatchNorm: the same function, what is left alone, files, bad input."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from laconic import load, save
from laconic.errors import ChainError, ModelError, ScopeError, TaskError
from laconic.models import preresnet, resnet20
from laconic.step import State, run_step
from laconic.structure import Fold, Prune
from laconic.structure.fold import folded, norms_behind
from laconic.tasks import Task
from laconic.weights import Quantize, activations_of
from laconic.weights.laid import mask_of, tie_

# Of float32 sums in another order, relative to outputs of size one.
CLOSE = 1e-4


def task(*shape: int) -> Task:
    generator = torch.Generator().manual_seed(0)
    pair = (torch.randn(8, *shape, generator=generator), torch.arange(8) % 4)
    return Task(pair, pair, pair)


def lived(model: nn.Module) -> nn.Module:
    """Return the network with statistics, scales and shifts that are not those of a new one."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.uniform_(-1.5, 1.5)
                    module.bias.normal_()
    return model.eval()


def outputs(model: nn.Module, data: Task) -> Tensor:
    with torch.no_grad():
        return data.call(model.eval(), data.example_batch(8))


def fold(model: nn.Module, data: Task, step: Fold | None = None) -> nn.Module:
    step, state = step or Fold(), State(copy.deepcopy(model), data)
    step.check(state.model, data)
    run_step(step, state)
    return state.model


class Doubled(nn.Module):
    """Writes to what its layer has computed before the norm reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.layer(inputs)
        hidden *= 2
        return self.norm(hidden)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.BatchNorm1d(4)), (6,)),
        (Doubled(), (6,)),
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), (4, 6)),
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(5)), (5, 6)),
    ],
    ids=["in place", "written to", "positions", "other positions"],
)
def test_a_norm_of_something_else_than_the_answers_stays(
    model: nn.Module, shape: tuple[int, ...]
) -> None:
    assert norms_behind(lived(model), task(*shape)) == {}
    plain = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    assert norms_behind(lived(plain), task(6)) == {"0": "1"}


class Scaled(nn.Module):
    """Reads the weight of its layer, or the scale of its norm, for something else too."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.layer, self.norm, self.what = nn.Linear(6, 4), nn.BatchNorm1d(4), what

    def forward(self, inputs: Tensor) -> Tensor:
        factor: Tensor = self.get_parameter(self.what)
        return self.norm(self.layer(inputs)) * factor.sum()


@pytest.mark.parametrize("what", ["layer.weight", "layer.bias", "norm.weight"])
def test_a_layer_whose_numbers_something_else_reads_stays(what: str) -> None:
    assert norms_behind(lived(Scaled(what)), task(6)) == {}


@pytest.mark.parametrize("inside", [torch.no_grad, torch.inference_mode])
def test_norms_are_found_wherever_the_caller_is(inside: type) -> None:
    plain = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    with inside():
        assert norms_behind(lived(plain), task(6)) == {"0": "1"}


def test_a_residual_network_computes_the_same_without_any_norm(tmp_path: Path) -> None:
    model, data = lived(resnet20()), task(3, 32, 32)
    small = fold(model, data)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small.modules())
    expected = outputs(model, data)
    scale = float(expected.abs().max())
    torch.testing.assert_close(outputs(small, data), expected, rtol=0, atol=CLOSE * scale)
    save(small, tmp_path / "model.safetensors")
    assert torch.equal(outputs(load(tmp_path / "model.safetensors"), data), outputs(small, data))


def test_a_linear_layer_and_a_norm_without_scale() -> None:
    model = lived(nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4, affine=False)))
    small = fold(model, task(5))
    torch.testing.assert_close(outputs(small, task(5)), outputs(model, task(5)))
    assert isinstance(small[1], nn.Identity) and small[0].bias is not None


def test_what_something_else_reads_stays() -> None:
    model, data = lived(preresnet(11)), task(3, 32, 32)
    pairs = norms_behind(model, data)
    small = fold(model, data)
    # The stem's output goes into a norm and past it; a second one follows the first convolution.
    assert "conv1" not in pairs and len(pairs) < sum(
        isinstance(module, nn.BatchNorm2d) for module in model.modules()
    )
    torch.testing.assert_close(outputs(small, data), outputs(model, data), rtol=0, atol=1e-3)


class Activated(nn.BatchNorm2d):
    """A norm that activates too, as some packages have it."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        return nn.functional.silu(super().forward(input))


class Wider(nn.Conv2d):
    """A convolution that pads as it likes."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        return super().forward(nn.functional.pad(input, (1, 1, 1, 1)))


def test_what_computes_otherwise_than_its_kind_stays() -> None:
    layers = [nn.Conv2d(3, 4, 3), Activated(4), Wider(4, 4, 3), nn.BatchNorm2d(4)]
    model = lived(nn.Sequential(*layers, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    data = task(3, 8, 8)
    assert norms_behind(model, data) == {"4": "5"}
    before = outputs(model, data)
    torch.testing.assert_close(outputs(fold(model, data), data), before, rtol=0, atol=CLOSE)


def test_a_frozen_network_is_folded_as_any_other() -> None:
    model, data = lived(preresnet(11)), task(3, 32, 32)
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert norms_behind(frozen, data) == norms_behind(model, data)
    small = fold(frozen, data)
    assert not any(parameter.requires_grad for parameter in small.parameters())
    torch.testing.assert_close(outputs(small, data), outputs(model, data), rtol=0, atol=1e-3)


def test_outputs_and_layers_called_twice_stay() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.second, self.after = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.first(x)
            return self.after(self.second(self.second(self.norm(x)))), x

    data = Task(
        *[(torch.randn(8, 4), torch.arange(8) % 4)] * 3,
        call=lambda model, batch: model(*batch.inputs)[0],
    )
    assert norms_behind(lived(Both()), data) == {}


def test_masks_and_rounded_inputs_are_kept() -> None:
    model, data = lived(resnet20()), task(3, 32, 32)
    state = State(model, data)
    run_step(Prune("weights", keep=0.5), state)
    run_step(Quantize(activation=8, scope="conv1"), state)
    before, mask = outputs(model, data), mask_of(model, "conv1.weight")
    places = activations_of(model)
    run_step(Fold(), state)
    assert mask is not None and torch.equal(mask, mask_of(model, "conv1.weight"))
    assert activations_of(model) == places
    scale = float(before.abs().max())
    torch.testing.assert_close(outputs(model, data), before, rtol=0, atol=CLOSE * scale)


def test_a_scope_leaves_the_others_their_norm() -> None:
    model, data = lived(resnet20()), task(3, 32, 32)
    small = fold(model, data, Fold(scope="conv1, bn1"))
    left = sum(isinstance(module, nn.BatchNorm2d) for module in small.modules())
    assert left == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) - 1


def test_formula() -> None:
    norm = lived(nn.Sequential(nn.BatchNorm1d(3)))[0]
    assert isinstance(norm, nn.BatchNorm1d)
    x, w, b = torch.randn(6, 5), torch.randn(3, 5), torch.randn(3)
    weight, bias = folded(w, b, norm)
    torch.testing.assert_close(x @ weight.T + bias, norm(x @ w.T + b))


def test_bad_input() -> None:
    data = task(3, 32, 32)
    with pytest.raises(TaskError):
        Fold().check(resnet20(), None)
    with pytest.raises(ScopeError, match="no BatchNorm with running statistics reads"):
        Fold(scope="conv1, linear").check(resnet20(), data)
    with pytest.raises(ChainError, match="fold first"):
        Fold().check(resnet20(), data, (Quantize(4),))
    model = resnet20()
    run_step(Quantize(4), State(model, data))
    run_step(Fold(), State(model, data))
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    tied = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    tie_(tied, {"2.weight": "0.weight"})
    with pytest.raises(ModelError):
        Fold().check(tied.eval(), task(4))
