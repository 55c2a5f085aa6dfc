"""Golden values of the distillation formulas: logits, attention maps, layer maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laconic.models.capture import Features
from laconic.recover import (
    AttentionTransfer,
    Chosen,
    Final,
    First,
    Last,
    LayerMap,
    Logits,
    Patience,
    Skip,
    Uniform,
)
from laconic.recover.distill import annealing, divergence, soft_cross_entropy
from laconic.recover.hints import attention_map, map_distance

DIGITS = 5e-8  # the values are printed with seven digits at least

STUDENT = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
TEACHER = torch.tensor([[1.0, 0.0, 4.0]], dtype=torch.float64)


def golden(value: Tensor, expected: float) -> None:
    assert float(value) == pytest.approx(expected, abs=DIGITS, rel=0)


@pytest.mark.parametrize(
    ("temperature", "kl", "cross_entropy"),
    [(1.0, 0.24366596, 0.51797904), (4.0, 0.72538170, 1.0476583)],
)
def test_logits_kd(temperature: float, kl: float, cross_entropy: float) -> None:
    """Hinton et al. 2015: KL times T squared; the soft cross entropy is not multiplied."""
    golden(divergence(STUDENT, TEACHER, temperature=temperature).sum(), kl)
    crossed = soft_cross_entropy(STUDENT, TEACHER, temperature=temperature)
    golden(crossed.sum(), cross_entropy)
    features = Features({"logits": STUDENT}), Features({"logits": TEACHER})
    golden(Logits(temperature).compare(*features), kl)
    both = Logits(temperature, loss="cross_entropy")
    golden(both.compare(*features), cross_entropy)


def test_reductions_of_the_repositories() -> None:
    """The mean over classes is a third of the sum of three."""
    golden(soft_cross_entropy(STUDENT, TEACHER).mean(), 0.17265968)
    features = Features({"logits": STUDENT}), Features({"logits": TEACHER})
    golden(Logits(loss="cross_entropy", reduction="elements").compare(*features), 0.17265968)
    golden(Logits(loss="l2", reduction="elements").compare(*features), (4 + 1) / 3)
    golden(Logits(loss="l1").compare(*features), 2 + 1)


def test_attention_transfer() -> None:
    """Zagoruyko and Komodakis 2017: squares hide the sign of a channel."""
    teacher = torch.arange(1.0, 9.0, dtype=torch.float64).reshape(1, 2, 2, 2)
    student = teacher.clone()
    student[:, 0] *= -1
    student[:, 1, 0, 0] = 0
    maps = attention_map(student), attention_map(teacher)
    golden(map_distance(*maps), 0.01314934)
    golden(map_distance(*maps) * 4, 0.05259735)
    features = Features({"output:a": student}), Features({"output:a": teacher})
    golden(AttentionTransfer(("output:a",)).compare(*features), 0.01314934)


@pytest.mark.parametrize(
    ("layers", "student", "taught"),
    [
        (Uniform(), 4, (3, 6, 9, 12)),
        (Uniform(), 6, (2, 4, 6, 8, 10, 12)),
        (Uniform(), 5, (2, 4, 7, 9, 12)),
        (Skip(2), 6, (2, 4, 6, 8, 10, 12)),
        (Skip(3), 4, (3, 6, 9, 12)),
        (First(), 4, (1, 2, 3, 4)),
        (Last(), 4, (9, 10, 11, 12)),
    ],
    ids=repr,
)
def test_layer_maps(layers: LayerMap, student: int, taught: tuple[int, ...]) -> None:
    assert layers.pairs(student, 12) == tuple(enumerate(taught, 1))


def test_layer_maps_that_leave_layers_out() -> None:
    assert Final().pairs(4, 12) == ((4, 12),)
    assert Chosen((0, 0, 5, 10)).pairs(4, 12) == ((3, 5), (4, 10))
    assert Chosen((0, 5, 0, 0, 0, 10)).pairs(6, 12) == ((2, 5), (6, 10))


def test_patience_leaves_the_last_layer_out() -> None:
    """Sun et al. 2019: PKD-Skip is 2, 4, 6, 8, 10 and PKD-Last 7 to 11."""
    skipped = Patience(Skip(2)).pairs(6, 12)
    assert skipped == tuple((f"hidden.{m}", f"hidden.{2 * m}") for m in range(1, 6))
    last = Patience(Last()).pairs(6, 12)
    assert last == tuple((f"hidden.{m}", f"hidden.{6 + m}") for m in range(1, 6))


def test_annealing() -> None:
    """Jafari et al. 2021, T_max = 5, for T = 5 to 1."""
    shares = [annealing(temperature, 5) for temperature in (5, 4, 3, 2, 1)]
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
