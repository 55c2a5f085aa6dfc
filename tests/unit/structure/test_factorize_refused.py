"""What factorize refuses: ranks, scopes, layers and fields that cannot work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from helpers.factorize import factorized, images, network
from laconic.errors import LaconicError, ModelError, RecipeError, ScopeError
from laconic.scope import Scope
from laconic.step import State, run_step
from laconic.structure.factorization import Factorization
from laconic.structure.factorize import Factorize
from laconic.structure.kernels import CP, DepthwiseSeparable, Separable, Tucker2, TwoThrees
from laconic.structure.matrices import SVD, BlockDiagonal, Embedding, TensorTrain
from laconic.tasks import Task
from laconic.weights import Symmetric, lay


def refused(
    step: Factorize, model: nn.Module, message: str, kind: type[LaconicError] = ModelError
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(kind, match=message):
        step.check(model, None)
    with pytest.raises(kind, match=message):
        run_step(step, State(model))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_rank_that_makes_a_layer_larger_is_refused_with_the_numbers() -> None:
    message = (
        r"factorize: '5' \[24, 32\]: SVD\(14\) makes 784 weights of 768; at most rank 13 makes it "
        r"smaller: choose less, or leave it out of the scope with '!5'"
    )
    refused(Factorize(SVD(14), scope=Scope("5")), network(), message)
    factorized(Factorize(SVD(13), scope=Scope("5")))
    # Grouped: twice 2 x (4 + 36) weights are 160 of 288.
    refused(
        Factorize(SVD(4), scope=Scope("2")), network(), "makes 320 weights of 288; at most rank 3"
    )
    refused(Factorize(Embedding(5)), nn.Sequential(nn.Embedding(9, 6)), "75 weights of 54.*rank 3")
    refused(Factorize(Tucker2((8, 8)), scope=Scope("0")), network(), "makes 880 weights of 800")


def test_an_energy_that_makes_a_layer_larger_is_refused_when_the_rank_is_known() -> None:
    model, step = network(), Factorize(SVD(energy=0.9999), scope=Scope("5"))
    step.check(model, None)
    with pytest.raises(ModelError, match=r"SVD\(energy=0.9999\) makes .* of 768; at most rank 13"):
        run_step(step, State(model))
    assert type(model[5]) is nn.Linear
    with pytest.raises(ModelError, match=r"TensorTrain\(eps=0.001\) makes"):
        run_step(Factorize(TensorTrain(eps=0.001), scope=Scope("5")), State(network()))


@pytest.mark.parametrize(
    ("method", "scope", "kinds"),
    [
        (SVD(), "1", "nn.Linear and nn.Conv2d"),
        (Embedding(2), "*", "nn.Embedding"),
        (Tucker2(), "kind:linear", "nn.Conv2d with a kernel larger than 1 x 1"),
        (TwoThrees(), "2", "nn.Conv2d with a 5 x 5 kernel"),
        (TensorTrain(), "kind:conv", "nn.Linear"),
    ],
)  # fmt: skip
def test_a_scope_without_a_fitting_layer_is_refused(
    method: Factorization, scope: str, kinds: str
) -> None:
    refused(Factorize(method, scope=Scope(scope)), network(), f"it splits {kinds}$", ScopeError)


def test_one_by_one_kernels_are_left_to_svd() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1))
    for method in (Tucker2(), CP(), Separable(), DepthwiseSeparable()):
        assert not method.fits(model[0])
    assert SVD().fits(model[0]) and BlockDiagonal().fits(model[0])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.middle(self.table(x)))


@pytest.mark.parametrize("laid", [False, True], ids=["plain", "laid"])
def test_a_weight_that_another_layer_shares_is_refused(laid: bool) -> None:
    model = Tied()
    if laid:
        lay(model, "out.weight", Symmetric(4))
    refused(Factorize(SVD(2)), model, "the weight of 'out' is also that of 'table'")
    refused(Factorize(Embedding(2)), model, "the weight of 'table' is also that of 'out'.*'!table'")
    run_step(Factorize(SVD(2), scope=Scope("*, !out")), State(model))
    assert model(torch.tensor([1, 2])).shape == (2, 20)


def test_what_cannot_be_replaced_is_refused() -> None:
    refused(Factorize(SVD()), nn.Linear(8, 8), "the network is a single layer")
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
    refused(Factorize(SVD()), encoder, "'0' is a TransformerEncoderLayer.*leave it out")
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)))
    refused(Factorize(SVD()), normed, "parametrization that is not laconic's")
    broken = nn.Sequential(nn.Linear(8, 8))
    broken[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="'0' holds NaN or infinity"):
        run_step(Factorize(SVD()), State(broken))


@pytest.mark.parametrize(
    ("method", "module", "message"),
    [
        (BlockDiagonal(5), nn.Linear(8, 12), r"5 blocks do not divide \[12, 8\].*divisor of 4"),
        (BlockDiagonal(2), nn.Conv2d(6, 6, 3, groups=2), r"2 blocks do not divide \[3, 3\]"),
        (Tucker2(), nn.Conv2d(8, 8, 4, padding="same"), "not the same on both sides"),
        (SVD(), nn.Conv2d(8, 8, (3, 2), padding="same"), "not the same on both sides"),
        (TensorTrain(rows=(2, 3), columns=(2, 4)), nn.Linear(8, 8), "do not multiply to a weight"),
        (Embedding(2), nn.Embedding(30, 8, max_norm=1.0), "max_norm"),
    ],
)  # fmt: skip
def test_what_the_parts_cannot_have_is_refused(
    method: Factorization, module: nn.Module, message: str
) -> None:
    refused(Factorize(method), nn.Sequential(module), f"factorize: '0': .*{message}")


def test_a_parent_that_reads_a_weight_is_found_where_there_are_data() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.to(self.inner.weight.dtype))

    x, labels = images(20, 6), torch.arange(20) % 2
    data = Task((x, labels), (x, labels), (x, labels))
    with pytest.raises(ModelError, match=r"runs no more: .*'weight', which '.*self\.inner\.weight"):
        run_step(Factorize(SVD(2)), State(Reader(), data))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SVD(rank=3, energy=0.5), "rank and energy each decide the rank"),
        (lambda: SVD(ratio=0.5, energy=0.5), "ratio and energy each decide"),
        (lambda: CP(rank=3, ratio=0.5), "rank and ratio each decide"),
        (lambda: Tucker2((3, 2), energy=0.5), "ranks and energy each decide"),
        (lambda: Tucker2((3, 2, 1)), "at most 2 items"),
        (lambda: TensorTrain(rows=(2, 3), columns=(2,)), "2 rows and 1 columns"),
        (lambda: SVD(rank=0), "greater than or equal to 1"),
        (lambda: SVD(ratio=1.0), "less than 1"),
        (lambda: BlockDiagonal(1), "greater than or equal to 2"),
    ],
)
def test_fields_that_contradict_are_refused(build: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build()
