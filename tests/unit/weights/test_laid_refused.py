"""Names, masks and weights that cannot be laid or narrowed, and what a failure leaves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import l1_unstructured

from laconic import Prune, Reconstruct, Task, compress
from laconic.errors import ModelError, RecipeError
from laconic.weights import Binary, Float, LearnedStep, Quantize, Symmetric, Ternary, lay
from laconic.weights.laid import narrow, owner


def test_a_wrong_name_is_answered_with_the_nearest() -> None:
    for wrong, told in (("ternry", "did you mean 'ternary'"), (9, "less than or equal to 8")):
        with pytest.raises(RecipeError, match=told):
            lay(nn.Sequential(nn.Linear(2, 2)), "0.weight", wrong)
    with pytest.raises(ModelError, match="no weight '0'; choose one of"):
        lay(nn.Sequential(nn.Linear(2, 2)), "0", Float())
    with pytest.raises(ModelError, match=r"no weight '0\.weigth'; did you mean '0\.weight'"):
        owner(nn.Sequential(nn.Linear(2, 2)), "0.weigth")


def test_what_nothing_can_represent_is_refused() -> None:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="'weight' holds NaN"):
        lay(model, "weight", Float())
    assert not parametrize.is_parametrized(model)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_holds_no_rows_of_numbers_is_refused() -> None:
    empty, scalar = nn.Linear(0, 4), nn.Module()
    scalar.weight = nn.Parameter(torch.tensor(1.0))
    for model in (empty, scalar):
        with pytest.raises(ModelError, match=r"'weight' has the shape .*only what has rows"):
            lay(model, "weight", Symmetric(4, granularity="row"))


def test_codes_of_what_overflows_are_refused() -> None:
    model = nn.Linear(256, 256).half()
    with torch.no_grad():
        model.weight.fill_(8.0)
    with pytest.raises(ModelError, match="'weight' becomes NaN or infinity as LearnedStep"):
        lay(model, "weight", LearnedStep())
    assert not parametrize.is_parametrized(model)
    lay(model, "weight", LearnedStep(granularity="row"))


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 2)], ids=["shape", "dtype"]
)
def test_a_mask_of_another_shape_or_type_is_refused(mask: Tensor) -> None:
    with pytest.raises(ModelError, match="mask of 'weight'"):
        lay(nn.Linear(2, 2), "weight", Float(), mask=mask)


@pytest.mark.parametrize("laid_before", [False, True])
def test_narrowing_refuses_a_mask_of_another_shape(laid_before: bool) -> None:
    model = nn.Linear(2, 2)
    if laid_before:
        lay(model, "weight", Ternary())
    with pytest.raises(ModelError, match="mask of 'weight'"):
        narrow(model, "weight", torch.ones(2, dtype=torch.bool))


def test_what_is_no_parameter_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ModelError, match=r"'1\.running_mean' is no parameter, but a buffer"):
        lay(model, "1.running_mean", Symmetric(8))
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model[0])
    with pytest.raises(ModelError, match=r"'0\.weight' is no parameter.*weight_norm"):
        lay(model, "0.weight", Ternary())


def test_a_failed_lay_leaves_the_model_as_it_was() -> None:
    model = nn.Linear(3, 3)
    lay(model, "weight", Binary())
    with pytest.raises(ModelError, match="do not divide"):
        lay(model, "weight", Symmetric(4, granularity=4))
    assert isinstance(model.parametrizations.weight[0].representation, Binary)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_rows_that_a_look_up_changes_are_refused(kind: type[nn.Module]) -> None:
    table = nn.Sequential(kind(4, 2, max_norm=1.0))
    for refuse in (
        lambda: lay(table, "0.weight", Ternary("row")),
        lambda: Quantize(Ternary("row")).check(table, None),
    ):
        with pytest.raises(ModelError, match=r"'0\.weight': max_norm changes rows in place"):
            refuse()


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_refused(kind: type[nn.Module]) -> None:
    table = nn.Sequential(kind(4, 2, sparse=True))
    for refuse in (
        lambda: lay(table, "0.weight", Ternary("row")),
        lambda: Quantize(Ternary("row")).check(table, None),
    ):
        with pytest.raises(ModelError, match=r"'0\.weight': sparse gradients .* sparse = False"):
            refuse()


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    ("wrap", "remedy"),
    [
        (nn.utils.weight_norm, "remove_weight_norm"),
        (nn.utils.spectral_norm, "remove_spectral_norm"),
        (lambda layer: l1_unstructured(layer, "weight", amount=0.5), r"prune\.remove"),
    ],
    ids=["weight_norm", "spectral_norm", "pruned"],
)
def test_a_weight_that_a_hook_makes_is_refused(
    wrap: Callable[[nn.Module], nn.Module], remedy: str
) -> None:
    model = nn.Sequential(wrap(nn.Linear(4, 3)))
    data = torch.rand(4, 4), torch.zeros(4, dtype=torch.long)
    task = Task(data, data, data)
    for step in (Quantize(4), Prune("weights", keep=0.5), Reconstruct()):
        with pytest.raises(ModelError, match=f"of a Linear: its 'weight' is made.*{remedy}"):
            compress(model, task, [step])
    # What touches no weight goes on as ever.
    assert compress(model, task, [Quantize(activation=8)]).history[-1].metrics
