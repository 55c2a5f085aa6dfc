"""compress(): networks whose numbers lie in memory in another way than usual."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from laconic.errors import ModelError
from laconic.models import digits_cnn
from laconic.run import compress
from laconic.ship import load
from laconic.tasks import digits
from laconic.weights import Quantize


def test_another_memory_format_gives_the_same_bits(tmp_path: Path) -> None:
    model, data = digits_cnn().to(memory_format=torch.channels_last), digits()
    result = compress(model, data, [Quantize(4)])
    result.save(tmp_path / "a")
    assert data.score(load(tmp_path / "a")) == data.score(result.model)
    assert not model.conv2.weight.is_contiguous()


def test_parameters_that_are_views_of_the_same_numbers_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    model[2].weight = nn.Parameter(model[0].weight.detach().t())
    message = r"'0\.weight' and '2\.weight' are two parameters over the same numbers.*one parameter"
    with pytest.raises(ModelError, match=message):
        compress(model, None, [])
    flat = digits_cnn()  # side by side in one piece of memory they are apart
    numbers = torch.cat([each.detach().flatten() for each in flat.parameters()])
    torch.nn.utils.vector_to_parameters(numbers, flat.parameters())
    assert compress(flat, None, []).history


def test_views_of_the_same_numbers_are_found_behind_others() -> None:
    """A column lies between the beginnings of two matrices that meet."""
    numbers = torch.randn(6, 8)
    model = nn.ParameterList(
        nn.Parameter(view) for view in (numbers[:, ::2], numbers[:, 1:2], numbers[:, 2:4])
    )
    with pytest.raises(ModelError, match=r"'0' and '2' are two parameters over the same numbers"):
        compress(model, None, [])


@pytest.mark.parametrize("dim", [0, 1])
def test_slices_of_one_tensor_are_apart(dim: int) -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    halves = torch.randn(*((16, 8) if dim == 0 else (8, 16))).chunk(2, dim)
    for layer, half in zip(model, halves, strict=True):
        layer.weight = nn.Parameter(half)
    assert compress(model, None, [Quantize(4)]).history
