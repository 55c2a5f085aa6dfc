"""The formulas of module-wise reconstruction, on numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from laconic.recover import Cross, Mixed
from laconic.recover.feeding import mixed
from laconic.recover.fitting import difference
from laconic.recover.parts import Answer
from laconic.recover.pipeline import balanced


def test_share_of_the_teacher_in_mrem() -> None:
    """Bai et al. 2022, T = 8 and T0 = 4: 1, 3/4, 1/2, 1/4, 0, 0."""
    shares = [1 - Mixed(end=0.5).mixtures(step / 8)[0].student for step in range(6)]
    assert shares == [1, 0.75, 0.5, 0.25, 0, 0]
    assert {Mixed(end=0.0).mixtures(step / 8)[0].student for step in range(9)} == {1.0}
    halves = [1 - Mixed(0.5, 1.0).mixtures(step / 4)[0].student for step in range(5)]
    assert halves == [0.5, 0.375, 0.25, 0.125, 0]


def test_what_the_student_is_fed_in_mrem() -> None:
    """f~ = 3/4 (4, 0) + 1/4 (0, 8) = (3, 2)."""
    (term,) = Mixed(end=0.5).mixtures(1 / 8)
    teacher, student = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 8.0])
    assert mixed(teacher, student, term.teacher).tolist() == [4, 0]
    assert mixed(student, teacher, term.student).tolist() == [3, 2]


def test_loss_of_a_module() -> None:
    """Layer 1: (1 + 4 + 0 + 9) / 4 = 3.5; layer 2: 4. The padded token counts for neither."""
    one = torch.tensor([[[1.0, 2.0], [0.0, 3.0], [50.0, 50.0]]])
    two = torch.tensor([[[2.0, 2.0], [2.0, 2.0], [70.0, 70.0]]])
    mask = torch.tensor([[True, True, False]])
    teacher = Answer([torch.zeros(1, 3, 2)] * 2, {"mask": mask})
    assert float(difference(Answer([one, two], {}), teacher)) == 7.5


def test_cross_distillation_weighs_correction_and_imitation() -> None:
    assert [(t.weight, t.teacher, t.student) for t in Cross(0.6).mixtures(0)] == [
        (pytest.approx(0.6), 1, 0),
        (pytest.approx(0.4), 0, 1),
    ]


def test_a_mixture_of_equals_is_themselves() -> None:
    feature = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(mixed(feature, feature, s / 7), feature) for s in range(8))


def test_cuts_of_blocks_by_their_time() -> None:
    """An embedding that costs as much as two layers, six layers, four devices."""
    assert balanced([2, 1, 1, 1, 1, 1, 1], 4) == [0, 1, 3, 5, 7]
