"""Metrics against scikit-learn and scipy, and what they say of degenerate predictions."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as oracle

from laconic.errors import TaskError
from laconic.tasks import (
    Batch,
    accuracy,
    f1,
    matthews,
    pearson,
    spearman,
    squared_error,
    top5_accuracy,
)
from laconic.tasks.metrics import as_values

# Sums of a few dozen float64 numbers, in another order than the oracle's.
CLOSE = 1e-9


def scores(predicted, classes):
    """Return outputs [examples, classes] whose largest one is the prediction."""
    generator = torch.Generator().manual_seed(len(predicted))
    noise = torch.rand(len(predicted), classes, generator=generator)
    noise[torch.arange(len(predicted)), predicted] += 1
    return noise


def labels(classes):
    pair = st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1))
    return st.lists(pair, min_size=1, max_size=40)


@settings(max_examples=60)
@given(labels(2))
def test_f1_equals_scikit_learn(pairs):
    predicted, true = torch.tensor(pairs).T
    expected = oracle.f1_score(true, predicted, zero_division=0.0)
    assert f1(scores(predicted, 2), true) == pytest.approx(expected, abs=CLOSE)


@settings(max_examples=60)
@given(st.sampled_from([2, 3, 5]).flatmap(lambda k: st.tuples(st.just(k), labels(k))))
def test_matthews_equals_scikit_learn(drawn):
    classes, pairs = drawn
    predicted, true = torch.tensor(pairs).T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single label
        expected = oracle.matthews_corrcoef(true, predicted)
    assert matthews(scores(predicted, classes), true) == pytest.approx(expected, abs=CLOSE)


@settings(max_examples=60)
@given(st.lists(st.tuples(*[st.integers(0, 2)] * 8), min_size=1, max_size=20))
def test_accuracies_take_the_first_of_equal_outputs(rows):
    """Outputs of seven classes, of three values, and a label."""
    outputs, true = torch.tensor(rows)[:, :7].float(), torch.tensor(rows)[:, 7]
    assert accuracy(outputs, true) == oracle.accuracy_score(true, outputs.argmax(1))
    best = outputs.argsort(dim=1, descending=True, stable=True)[:, :5]
    assert top5_accuracy(outputs, true) == float((best == true[:, None]).any(1).double().mean())


@pytest.mark.parametrize("metric", [accuracy, top5_accuracy, f1, matthews])
def test_outputs_that_are_no_numbers_have_no_score(metric):
    outputs = torch.tensor([[0.0, 1.0], [math.nan, 0.0]])
    assert math.isnan(metric(outputs, torch.tensor([1, 0])))


@pytest.mark.parametrize("metric", [accuracy, top5_accuracy, f1, matthews])
@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(0), "labels"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), "from 0 to 2 and there are 2 outputs"),
        (torch.zeros(2, 2), torch.tensor([-1, 1]), "from -1 to 1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(metric, outputs, targets, message):
    with pytest.raises(TaskError, match=message):
        metric(outputs, targets)


@pytest.mark.parametrize("metric", [pearson, spearman])
def test_values_of_no_example_are_refused(metric):
    with pytest.raises(TaskError, match="one output"):
        metric(torch.zeros(0), torch.zeros(0))


# Few different numbers, so that many are equal: ranks are shared.
numbers = st.sampled_from([-3.5, -1.0, 0.0, 0.1, 0.25, 2.0, 1e6])


@settings(max_examples=60)
@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=40))
def test_correlations_equal_scipy(pairs):
    outputs, targets = torch.tensor(pairs).T
    varied = len(outputs.unique()) > 1 and len(targets.unique()) > 1
    for ours, theirs in ((pearson, stats.pearsonr), (spearman, stats.spearmanr)):
        expected = theirs(outputs.double(), targets.double())[0] if varied else 0.0
        assert ours(outputs, targets) == pytest.approx(expected, abs=CLOSE)
        assert ours(outputs[:, None], targets) == ours(outputs, targets)


def test_correlations_do_not_depend_on_scale():
    outputs = torch.rand(100, generator=torch.Generator().manual_seed(1))
    targets = outputs + torch.rand(100, generator=torch.Generator().manual_seed(2))
    assert pearson(3 * outputs + 5, targets) == pytest.approx(pearson(outputs, targets), rel=1e-5)
    assert spearman(outputs.exp(), targets) == spearman(outputs, targets)
    assert pearson(-targets, targets) == -1 and spearman(targets, targets) == 1


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30, 3e7])
def test_constant_predictions_score_nothing(value):
    targets = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    constant = torch.full((1000, 1), value)
    assert pearson(constant, targets) == spearman(constant, targets) == 0.0
    assert pearson(targets, constant[:, 0]) == spearman(targets, constant[:, 0]) == 0.0


@pytest.mark.parametrize("always", [0, 1])
def test_one_class_predicted_or_true_scores_nothing(always):
    same, mixed = torch.full((10,), always), torch.arange(10) % 2
    assert matthews(scores(same, 2), mixed) == matthews(scores(mixed, 2), same) == 0.0
    assert f1(scores(same * 0, 2), mixed) == f1(scores(same * 0, 2), same * 0) == 0.0


def test_matthews_is_exact_for_many_examples():
    # Products of squares beyond 2 ** 64, which no machine integer holds.
    true = torch.arange(400_000) % 2
    assert matthews(scores(true, 2), true) == 1.0
    assert matthews(scores(1 - true, 2), true) == -1.0


def test_outputs_that_are_not_finite_are_not_hidden():
    targets = torch.arange(4.0)
    broken = torch.tensor([0.0, math.nan, 1.0, 2.0])
    assert math.isnan(pearson(broken, targets)) and math.isnan(spearman(broken, targets))


def test_squared_error_is_its_formula_for_either_shape():
    outputs, values = torch.tensor([[0.5], [2.0]]), torch.tensor([1.0, 4.0])
    assert float(squared_error(outputs, Batch((), values))) == (0.5**2 + 2.0**2) / 2
    assert squared_error(outputs[:, 0], Batch((), values)) == squared_error(
        outputs, Batch((), values)
    )
    with pytest.raises(TaskError, match="have no targets"):
        squared_error(outputs, Batch(()))


@pytest.mark.parametrize(
    ("metric", "outputs", "targets", "message"),
    [
        (f1, (4, 3), torch.zeros(4).long(), "3 outputs per example"),
        (f1, (4,), torch.zeros(4).long(), r"f1 needs outputs \[examples, classes\]"),
        (matthews, (4, 2), torch.zeros(3).long(), r"got \[4, 2\] and \[3\]"),
        (matthews, (4, 2), torch.tensor([0, 1, 2, 1]), "go from 0 to 2 and there are 2 outputs"),
        (pearson, (4, 2), torch.zeros(4), r"got \[4, 2\] and \[4\]; give the network one output"),
        (spearman, (4, 1), torch.zeros(3), r"got \[4, 1\] and \[3\]"),
        (as_values, (4, 1), torch.zeros(4, 1), r"got \[4, 1\] and \[4, 1\]"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(metric, outputs, targets, message):
    with pytest.raises(TaskError, match=message):
        metric(torch.zeros(outputs), targets)


def test_a_column_of_targets_is_told_to_be_a_row():
    with pytest.raises(TaskError, match=r"give targets\[:, 0\]"):
        pearson(torch.zeros(3, 1), torch.zeros(3, 1))
