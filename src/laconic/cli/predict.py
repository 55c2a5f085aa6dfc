"""What a recipe will cost and give, before any training: its size and its time."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from laconic.cli.samples import First, glance
from laconic.ledger import Measurement
from laconic.measure import measure
from laconic.recipe import Recipe, located
from laconic.recover.lesson import Teachers
from laconic.recover.train import Train
from laconic.run import check_teachers, pick_precision
from laconic.step import State, Step, run_step
from laconic.weights.laid import copied

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["Prediction", "StepPrediction", "predict", "trainings"]

REPEATS = 3
SEVERAL = 3  # batches, or what else is repeated, where there are as many


@dataclass(frozen=True)
class StepPrediction:
    """What one step is expected to leave and to take.

    Attributes:
        step: name.
        nominal_bytes: codes alone, as papers count: weights x keep x bits / 8.
        size_bytes: of the file, were it written untrained.
        updates: of the optimiser.
        seconds: of training, of what else is repeated, and of a step that is run as it is.
    """

    step: str
    nominal_bytes: int
    size_bytes: int
    updates: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """What a recipe is expected to cost.

    Attributes:
        rows: the network as it is, then after every step.
        exceeded: field of the budget -> by how much; empty: it is met.
    """

    rows: tuple[StepPrediction, ...]
    exceeded: dict[str, float]

    @property
    def seconds(self) -> float:
        """Return the time of all steps."""
        return sum(row.seconds for row in self.rows)


def predict(
    recipe: Recipe,
    model: nn.Module,
    task: Task | None,
    *,
    device: str,
    teachers: tuple[nn.Module, ...] = (),
) -> Prediction:
    """Run a recipe without its training and return what to expect of it.

    Sizes come from what every step does to a copy of the untrained network besides training; time
    comes from a few updates on a copy, times the updates the recipe asks for.

    Args:
        recipe: checked against the model and the task already.
        model: left untouched.
        task: data the steps are timed on.
        device: where the recipe would run.
        teachers: what objectives learn from; none: the network.

    Raises:
        LaconicError: a step failed.

    >>> from laconic.models import digits_cnn
    >>> from laconic.structure import Prune
    >>> found = predict(Recipe([Prune("weights", keep=0.1)]), digits_cnn(), None, device="cpu")
    >>> found.rows[1].nominal_bytes < 0.2 * found.rows[0].nominal_bytes
    True
    """
    teachers = teachers or (model,)
    check_teachers(recipe, teachers, task)
    state = State(
        copied(model).to(device),
        task,
        teacher=Teachers(teachers, device),
        seed=recipe.seed,
        device=device,
        precision=pick_precision(recipe.precision, device),
    )
    small = None if task is None else glance(task)
    if small is not None:
        small.score(state.model)  # what does not fit the data is refused here
    measured = functools.partial(measure, task=small, latency=recipe.budget is not None)
    history = [measured(state.model)]
    rows = [_row("original", history[0], 0, 0.0)]
    for index, step in enumerate(recipe.steps):
        earlier = sum(other.name == step.name for other in recipe.steps[:index])
        with located(index, step, recipe.places):
            updates, seconds = _repeated(step, state, earlier)
            history.append(measured(state.model))
            more, training = _training(step, state)
            rows.append(_row(step.name, history[-1], updates + more, seconds + training))
    exceeded = {}
    if recipe.budget is not None:
        first, last = (vars(history[place]) for place in (0, -1))
        exceeded = recipe.budget.exceeded_by(last, first)
    return Prediction(tuple(rows), exceeded)


def trainings(step: Step, times: int = 1) -> Iterator[tuple[Train, int]]:
    """Yield the trainings inside a step, and how many times each is run.

    >>> from laconic.structure import Prune
    >>> step = Prune("weights", keep=0.5, rounds=3, retrain=Train(epochs=2))
    >>> list(trainings(step))
    [(Train(epochs=2), 3)]
    """
    if isinstance(step, Train):
        yield step, times
        return
    for value in dict(step).values():
        if isinstance(value, Step):
            yield from trainings(value, times * step.repeats)


def _row(name: str, measured: Measurement, updates: int, seconds: float) -> StepPrediction:
    nominal = math.ceil(measured.nominal_bits / 8)
    return StepPrediction(name, nominal, measured.size_bytes, updates, seconds)


def _repeated(step: Step, state: State, key: int) -> tuple[int, float]:
    """Run a step without its training; return updates and seconds of what it repeats.

    They follow from doing that once and several times. Where nothing is repeated, a step that is
    run as it is takes the time that took.
    """
    if step.repeats == 1:
        seconds = _run_abridged(step, state, 1, key)
        return 0, seconds if step.abridged() == (step,) else 0.0
    several = min(1 + SEVERAL, step.repeats)
    trial = dataclasses.replace(state, model=copied(state.model), curves={})
    once = _run_abridged(step, state, 1, key)
    each = (_run_abridged(step, trial, several, key) - once) / (several - 1)
    return len(trial.curves) * step.repeats, once + (step.repeats - 1) * max(each, 0.0)


def _run_abridged(step: Step, state: State, repeats: int, key: int) -> float:
    """Run what a step does besides training, and return the seconds that takes."""
    began = time.perf_counter()
    for part in step.abridged(repeats):
        run_step(part, state, key=key)
    return time.perf_counter() - began


def _training(step: Step, state: State) -> tuple[int, float]:
    """Return updates and seconds of all training inside a step."""
    updates, seconds = 0, 0.0
    if state.task is None:
        return updates, seconds
    for train, times in trainings(step):
        per_epoch = state.task.train.batch_count(train.batch)
        updates += times * train.epochs * per_epoch
        seconds += times * train.epochs * _epoch_seconds(train, state, state.task, per_epoch)
    return updates, seconds


def _epoch_seconds(train: Train, state: State, task: Task, per_epoch: int) -> float:
    """Return the time of an epoch, from trainings of one batch and of several.

    Their difference is that of updates alone: preparing a training and scoring an epoch cancel.
    """
    several = min(SEVERAL, per_epoch)
    once, score = _timed(train, state, task, 1)
    update = once - score
    if several > 1:
        more, _ = _timed(train, state, task, several)
        update = (more - once) / (several - 1) if more > once else update
    scored = next(First(task.validate, train.batch).batches(train.batch)).size
    return per_epoch * max(update, 0.0) + score * len(task.validate) / scored


def _timed(train: Train, state: State, task: Task, batches: int) -> tuple[float, float]:
    """Return the median seconds of a training of a few batches, and of scoring one."""
    small = copy.copy(task)
    small.train = First(task.train, train.batch, batches=batches)
    small.validate = First(task.validate, train.batch)
    once = train.model_copy(update={"epochs": 1, "during": ()})
    trial = dataclasses.replace(state, model=copied(state.model), task=small)
    trainings, scores = [], []
    for _ in range(REPEATS + 1):  # the first one warms up
        began = time.perf_counter()
        run_step(once, trial)
        trainings.append(time.perf_counter() - began)
        small.score(trial.model, "validate", device=state.device)
        scores.append(time.perf_counter() - began - trainings[-1])
    return statistics.median(trainings[1:]), statistics.median(scores[1:])
