"""The formulas of reconstruction on few data: hand-computed vectors, brute force, identities."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from laconic.recover import Cross, Feed, Mixed, ProximalWeights, SoftCross, Student, Teacher
from laconic.recover.feeding import mixed
from laconic.recover.penalties import channel_norms, shrink, shrink_channels
from laconic.recover.quadratic import Fitted, Moments, Quadratic, matrix_of, patches, weight_of
from laconic.recover.solve import closest, contributions, greedy_channels, lasso_channels

# A few float32 roundings of numbers near one.
ROUNDING = 1e-6
# What sums of thousands of float32 products may differ by, relative.
SUMMED = 1e-4

LAYERS: dict[str, tuple[Callable[[], Fitted], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 6), (5, 7, 4)),
    "no bias": (lambda: nn.Linear(4, 6, bias=False), (9, 4)),
    "strided": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False), (5, 4, 9, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, (3, 1), groups=2), (5, 4, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (5, 4, 9, 8)),
    "reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (5, 4, 9, 8)),
    "one dimension": (lambda: nn.Conv1d(4, 6, 3, dilation=2, padding="same"), (5, 4, 9)),
}
FEEDS = (Student(), Teacher(), Mixed(0.5, 1.0), Cross(0.7), SoftCross(0.8, 0.6))


def pair(kind: str) -> tuple[Fitted, Fitted, Tensor, Tensor]:
    """Return a layer of the teacher and of the student, and what enters them."""
    build, shape = LAYERS[kind]
    teacher, student = build(), build()
    first = torch.randn(shape)
    return teacher, student, first, first + 0.3 * torch.randn(shape)


def direct(feed: Feed, teacher: Fitted, student: Fitted, both: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss as the paper writes it, by the layers themselves."""
    total = torch.zeros(())
    for term in feed.mixtures(0.25):
        taught = mixed(*both, term.teacher)
        own = mixed(*reversed(both), term.student)
        total = total + term.weight * (teacher(taught) - student(own)).square().mean()
    return total.detach()


@pytest.mark.parametrize("kind", LAYERS)
def test_patches_times_matrix_is_the_layer(kind: str) -> None:
    teacher, _, inputs, _ = pair(kind)
    answers = patches(teacher, inputs) @ matrix_of(teacher)
    expected = teacher(inputs)
    if not isinstance(teacher, nn.Linear):
        expected = expected.movedim(1, -1)
    joined = answers.transpose(0, 1).reshape(expected.shape)
    assert torch.allclose(joined, expected, atol=ROUNDING)
    weight, bias = weight_of(teacher, matrix_of(teacher))
    assert torch.equal(weight, teacher.weight)
    assert (bias is None) == (teacher.bias is None)
    assert bias is None or torch.equal(bias, teacher.bias)


@pytest.mark.parametrize("feed", FEEDS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_quadratic_form_is_the_loss(kind: str, feed: Feed) -> None:
    teacher, student, first, second = pair(kind)
    moments = Moments(teacher, student)
    for start in range(0, len(first), 2):
        moments.add(first[start : start + 2], second[start : start + 2])
    form = moments.quadratic(feed.mixtures(0.25)).to(torch.float32)
    expected = direct(feed, teacher, student, (first, second))
    matrix, start = matrix_of(student).detach(), matrix_of(teacher).detach()
    assert float(form(matrix)) == pytest.approx(float(expected), rel=SUMMED)
    near = moments.quadratic(feed.mixtures(0.25), start.double()).to(torch.float32)
    assert float(near(matrix - start)) == pytest.approx(float(expected), rel=SUMMED)
    wide = moments.quadratic(feed.mixtures(0.25))
    assert torch.autograd.gradcheck(wide, (matrix.double().requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("feed", FEEDS, ids=str)
def test_quadratic_form_near_the_teacher(feed: Feed, dtype: torch.dtype) -> None:
    """A loss of a hundred-thousandth of the answers' power, of numbers whose squares overflow."""
    teacher, student, first, _ = pair("strided")
    with torch.no_grad():
        for own, other in zip(student.parameters(), teacher.parameters(), strict=True):
            own.copy_(other + 0.005 * torch.randn_like(own))
    teacher, student = teacher.to(dtype), student.to(dtype)
    first = (300 * first).to(dtype)
    second = first + (300 * 0.005 * torch.randn(first.shape)).to(dtype)
    moments = Moments(teacher, student)
    moments.add(first, second)
    start = matrix_of(teacher).detach().double()
    step = matrix_of(student).detach().double() - start
    found = moments.quadratic(feed.mixtures(0.25), start)(step)
    wide = [each.double() for each in (teacher, student, first, second)]
    assert float(found) == pytest.approx(float(direct(feed, *wide[:2], wide[2:])), rel=SUMMED)


def test_quadratic_form_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student, first, second = pair("strided")
    whole, pieces = Moments(teacher, student), Moments(teacher, student)
    whole.add(first, second)
    monkeypatch.setattr("laconic.recover.quadratic.UNFOLDED", 1)
    pieces.add(first, second)
    assert pieces.rows == whole.rows
    assert torch.allclose(pieces.cross, whole.cross, atol=SUMMED)


def test_padding_does_not_count() -> None:
    teacher, student, first, second = pair("linear")
    mask = torch.arange(7).expand(5, 7) < torch.tensor([[7], [3], [1], [5], [2]])
    moments = Moments(teacher, student)
    moments.add(first, second, mask)
    form = moments.quadratic(Student().mixtures(0.0)).to(torch.float32)
    expected = (teacher(first) - student(second))[mask].square().mean()
    assert moments.rows == int(mask.sum())
    assert form(matrix_of(student)).item() == pytest.approx(expected.item(), rel=SUMMED)


def test_a_convolution_of_as_many_channels_as_there_are_tokens_reads_no_mask() -> None:
    layer = nn.Conv1d(6, 2, 3)
    moments = Moments(layer, layer)
    moments.add(*[torch.randn(5, 6, 6)] * 2, torch.ones(5, 6, dtype=torch.bool))
    assert moments.rows == 5 * 4


def test_a_narrower_student_is_fed_its_own() -> None:
    teacher, student = nn.Conv2d(6, 4, 3), nn.Conv2d(3, 4, 3)
    first, second = torch.randn(5, 6, 6, 6), torch.randn(5, 3, 6, 6)
    moments = Moments(teacher, student)
    moments.add(first, second)
    form = moments.quadratic(Student().mixtures(0.0)).to(torch.float32)
    expected = (teacher(first) - student(second)).square().mean()
    assert form(matrix_of(student)).item() == pytest.approx(expected.item(), rel=SUMMED)


# Identities of the feeding rules.


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SoftCross(1, 1), Student()),
        (SoftCross(1, 0), Teacher()),
        (Cross(1), Teacher()),
        (Cross(0), SoftCross(0, 1)),
        (Mixed(end=0), Student()),
    ],
    ids=str,
)
def test_feeds_that_are_the_same(first: Feed, second: Feed) -> None:
    assert first.mixtures(0.0) == second.mixtures(0.0)


def test_mixed_at_first_is_full_teacher_forcing() -> None:
    assert Mixed().mixtures(0.0) == Teacher().mixtures(0.0)
    assert Mixed().mixtures(Mixed().settled) == Student().mixtures(0.0)


@pytest.mark.parametrize("feed", FEEDS, ids=str)
def test_all_losses_coincide_where_the_inputs_do(feed: Feed) -> None:
    teacher, student, first, _ = pair("strided")
    expected = (teacher(first) - student(first)).square().mean()
    found = direct(feed, teacher, student, (first, first))
    assert float(found) == pytest.approx(expected.item(), rel=SUMMED)


def test_the_teachers_weights_have_no_cross_loss() -> None:
    teacher, _, first, second = pair("strided")
    assert float(direct(Cross(0.4), teacher, teacher, (first, second))) == 0


def test_triangle_inequality_of_the_paper() -> None:
    teacher, student, first, second = pair("strided")
    prior, correction, imitation = (
        float(direct(feed, teacher, student, (first, second))) ** 0.5
        for feed in (Student(), Teacher(), SoftCross(0, 1))
    )
    own = (student(first) - student(second)).square().mean().item() ** 0.5
    taught = (teacher(first) - teacher(second)).square().mean().item() ** 0.5
    assert prior <= correction + own + ROUNDING
    assert prior <= imitation + taught + ROUNDING


# Proximal operators.


def test_shrink_vector() -> None:
    found = shrink(torch.tensor([-1.0, 0.2, 0.7]), 0.5)
    assert found.tolist() == pytest.approx([-0.5, 0.0, 0.2], abs=ROUNDING)


def test_shrink_channels_vector() -> None:
    weight = torch.tensor([[3.0, 0.3], [4.0, 0.4]])
    found = shrink_channels(weight, 1.0)
    assert found.flatten().tolist() == pytest.approx([2.4, 0.0, 3.2, 0.0], abs=ROUNDING)
    assert channel_norms(weight).tolist() == pytest.approx([5.0, 0.5])


NUMBERS = st.floats(-4, 4).map(lambda number: round(number, 3))
THRESHOLDS = st.floats(0, 3).map(lambda number: round(number, 3))


@given(NUMBERS, THRESHOLDS)
def test_shrink_is_the_minimum(number: float, threshold: float) -> None:
    grid = torch.arange(-5, 5, 1e-3, dtype=torch.float64)
    energy = 0.5 * (grid - number).square() + threshold * grid.abs()
    found = float(shrink(torch.tensor(number, dtype=torch.float64), threshold))
    least = 0.5 * (found - number) ** 2 + threshold * abs(found)
    assert least <= float(energy.min()) + 1e-12


@given(st.lists(NUMBERS, min_size=2, max_size=2), THRESHOLDS)
def test_shrink_channels_is_the_minimum(numbers: list[float], threshold: float) -> None:
    weight = torch.tensor(numbers, dtype=torch.float64)[:, None]
    found = shrink_channels(weight, threshold)
    axis = torch.linspace(-5, 5, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    energy = 0.5 * (grid - weight.T).square().sum(dim=1) + threshold * grid.norm(dim=1)
    least = 0.5 * (found - weight).square().sum() + threshold * found.norm()
    assert float(least) <= float(energy.min()) + 1e-12


@pytest.mark.parametrize("operator", [shrink, shrink_channels])
def test_operators_are_non_expansive(operator: Callable[[Tensor, float], Tensor]) -> None:
    for threshold in (0.0, 0.3, 2.0):
        first, second = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64)
        apart = (operator(first, threshold) - operator(second, threshold)).norm()
        assert float(apart) <= float((first - second).norm())


def test_due_falls_in_a_straight_line() -> None:
    penalty = ProximalWeights(0.5, end=1 / 3)
    assert [penalty.due(10, step, 12) for step in range(6)] == [10, 8, 7, 6, 5, 5]


# Closed forms.


def quadratic(rows: int = 40, channels: int = 6, size: int = 2) -> tuple[Tensor, Tensor, Quadratic]:
    """Return rows X, answers Y and the form of ||X W - Y||^2."""
    inputs = torch.randn(rows, channels * size, dtype=torch.float64)
    answers = torch.randn(rows, 3, dtype=torch.float64)
    gram, product = (inputs.T @ inputs)[None], (inputs.T @ answers)[None]
    return inputs, answers, Quadratic(gram, product, float(answers.square().sum()), 3 * rows)


def test_least_squares_residual_is_orthogonal_to_the_design() -> None:
    inputs, answers, form = quadratic()
    left = torch.ones(1, 12, 3, dtype=torch.bool)
    left[:, 4:6] = False
    found = closest(form, torch.zeros(1, 12, 3, dtype=torch.float64), left)[0]
    rest = answers - inputs @ found
    assert not found[4:6].any()
    assert float((inputs[:, left[0, :, 0]].T @ rest).abs().max()) < 1e-9


def test_least_squares_of_masks_that_differ_by_answer() -> None:
    inputs, answers, form = quadratic()
    left = torch.rand(1, 12, 3) < 0.5
    found = closest(form, torch.zeros(1, 12, 3, dtype=torch.float64), left)[0]
    for column in range(3):
        rows = left[0, :, column]
        expected = torch.linalg.lstsq(inputs[:, rows], answers[:, column, None]).solution[:, 0]
        assert torch.allclose(found[rows, column], expected)
        assert not found[~rows, column].any()


def test_least_squares_keep_what_the_examples_do_not_determine() -> None:
    inputs, answers, form = quadratic(rows=4)
    start = torch.randn(1, 12, 3, dtype=torch.float64)
    found = closest(form, start)[0]
    assert torch.allclose(inputs @ found, answers)
    _, _, basis = torch.linalg.svd(inputs)
    unseen = basis[4:]
    assert torch.allclose(unseen @ found, unseen @ start[0])


def test_contributions_are_inner_products() -> None:
    inputs, answers, _ = quadratic()
    biased = torch.cat([inputs, torch.ones(40, 1, dtype=torch.float64)], dim=1)
    matrix = torch.randn(13, 3, dtype=torch.float64)
    form = Quadratic((biased.T @ biased)[None], (biased.T @ answers)[None], 0.0, 120)
    parts = [inputs[:, 2 * c : 2 * c + 2] @ matrix[2 * c : 2 * c + 2] for c in range(6)]
    inner, toward = contributions(form, matrix[None], (6, 2))
    for first, second in itertools.product(range(6), repeat=2):
        assert float(inner[first, second]) == pytest.approx(
            float((parts[first] * parts[second]).sum())
        )
    for channel, part in enumerate(parts):
        assert float(toward[channel]) == pytest.approx(float((part * (answers - matrix[-1])).sum()))


def test_contributions_of_a_grouped_layer_are_those_of_all_groups() -> None:
    layer = nn.Conv1d(6, 4, 1, groups=2).double()
    inputs = torch.randn(5, 6, 7, dtype=torch.float64)
    moments = Moments(layer, layer)
    moments.add(inputs, inputs)
    matrix = matrix_of(layer).detach()
    inner, toward = contributions(moments.quadratic(Student().mixtures(0.0)), matrix, (3, 1))
    parts = torch.stack(  # channel i of each group
        [nn.functional.conv1d(inputs * _only(i), layer.weight, groups=2) for i in range(3)]
    ).flatten(1)
    assert torch.allclose(inner, parts @ parts.T)
    assert torch.allclose(toward, parts @ parts.sum(dim=0))


def _only(channel: int) -> torch.Tensor:
    """Return a 1 for this channel of each of two groups of three [6, 1]."""
    return (torch.arange(6) % 3 == channel).double()[:, None]


def test_greedy_removes_the_best_single_channel() -> None:
    parts = torch.randn(6, 50)
    inner = parts @ parts.T
    kept = greedy_channels(inner, 5)
    assert int((~kept).nonzero()) == int(parts.square().sum(dim=1).argmin())


def test_greedy_is_no_worse_than_chance_and_two_are_as_good_as_brute_force_one_by_one() -> None:
    parts = torch.randn(6, 50)
    inner = parts @ parts.T

    def missed(removed: tuple[int, ...]) -> float:
        return float(parts[list(removed)].sum(dim=0).square().sum())

    kept = greedy_channels(inner, 4)
    removed = tuple((~kept).nonzero()[:, 0].tolist())
    first = int(parts.square().sum(dim=1).argmin())
    assert missed(removed) == pytest.approx(min(missed((first, c)) for c in range(6) if c != first))
    every = [missed(each) for each in itertools.combinations(range(6), 2)]
    assert missed(removed) <= sum(every) / len(every)


def test_lasso_lets_in_the_channels_of_the_answer() -> None:
    parts = torch.randn(6, 500, dtype=torch.float64)
    answer = 2 * parts[1] - 3 * parts[4] + 0.01 * torch.randn(500, dtype=torch.float64)
    kept = lasso_channels(parts @ parts.T, parts @ answer, 2)
    assert kept.nonzero()[:, 0].tolist() == [1, 4]


def test_lasso_lets_in_as_many_as_are_wanted_however_many_there_are() -> None:
    sizes = torch.randperm(700).double() + 1
    kept = lasso_channels(torch.eye(700, dtype=torch.float64), sizes, 650)
    assert torch.equal(kept, sizes > 50)


def test_lasso_fills_up_where_channels_are_dead() -> None:
    inner = torch.diag(torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    kept = lasso_channels(inner, torch.tensor([0.0, 1.0, 0.0, 2.0], dtype=torch.float64), 3)
    assert int(kept.sum()) == 3
    assert kept[1]
    assert kept[3]
