"""compress(): run a recipe on a network, measure every step, survive a crash."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from laconic import measure as measuring
from laconic import ranks
from laconic.budget import bytes_of
from laconic.errors import ModelError, RecipeError, RunError, TaskError
from laconic.ledger import Measurement
from laconic.models.load import layers_builder
from laconic.models.notes import noted
from laconic.own import explained
from laconic.recipe import Recipe, located
from laconic.recover.lesson import Teachers
from laconic.recover.objectives import Objective
from laconic.rundir import ARTIFACT, REPORT, Keeper
from laconic.ship.artifact import save
from laconic.ship.checkpoint import model_hash
from laconic.ship.verification import verify
from laconic.step import State, Step, inside, run_step
from laconic.tasks.task import Task, device_of, full_precision
from laconic.weights.laid import as_stored, baked, copied

__all__ = [
    "Result",
    "check_teachers",
    "compress",
    "pick_device",
    "pick_precision",
    "refuse_unusable",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a recipe made of a network.

    Attributes:
        model: the compressed network, its weights still laid.
        history: one measurement before the first step and one after each.
        recipe: what was run.
        task: on what.
        facts: of the run: versions, machine, seed, notes.
        out: the run directory, or None.

    >>> from laconic.models import digits_cnn
    >>> from laconic.structure import Prune
    >>> result = compress(digits_cnn(), None, [Prune("weights", keep=0.5)])
    >>> [measured.step for measured in result.history]
    ['original', 'prune']
    """

    model: nn.Module = field(repr=False)
    history: tuple[Measurement, ...]
    recipe: Recipe
    task: Task | None = field(repr=False)
    facts: dict[str, Any] = field(repr=False)
    out: Path | None = None

    def baked(self) -> nn.Module:
        """Return a copy with plain float weights, equal bit for bit."""
        return baked(self.model)

    def save(self, path: str | Path) -> int:
        """Write the artefact and return its size in bytes."""
        return save(self.model, path, task=self.task, probe=True)

    def report(self, path: str | Path) -> Path:
        """Write the HTML report and return its path."""
        from laconic.report.report import write_report

        return write_report(self.history, self.facts, Path(path))

    def exceeded(self) -> dict[str, float]:
        """Return what the budget is exceeded by; empty: it is met."""
        if self.recipe.budget is None:
            return {}
        first, last = (vars(self.history[place]) for place in (0, -1))
        return self.recipe.budget.exceeded_by(last, first)


def compress(
    model: nn.Module,
    task: Task | None,
    steps: Recipe | Sequence[Step],
    *,
    teacher: nn.Module | Sequence[nn.Module] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    device: str | None = None,
    checkpoint_seconds: float = 300.0,
    progress: bool = False,
) -> Result:
    """Run a recipe on a copy of a network.

    With a run directory, everything that happened is kept there: recipe, history, artefact,
    report, and a checkpoint from which a killed run goes on as if nothing had happened.
    Ctrl-C, and SIGTERM, write a checkpoint first; a second one stops at once.

    Under torchrun every process calls it and gets the result. What runs in parallel shares its
    work among them, each on its own GPU; all else every process does by itself. The first one
    writes.

    Args:
        model: the trained network; left untouched.
        task: data, loss and metrics.
        steps: a recipe, or its steps.
        teacher: what objectives learn from, one or several, left untouched; None: the network as
            it is now.
        out: the run directory; None keeps nothing on disk.
        resume: go on from the checkpoint in ``out``, where there is one.
        device: "cpu", "cuda", ...; None: a GPU when present.
        checkpoint_seconds: seconds of training between two checkpoints.
        progress: show what is going on and the time left, on a terminal or in a notebook.

    Raises:
        LaconicError: the recipe does not fit, or a step failed.

    >>> from laconic.models import digits_cnn
    >>> from laconic.structure import Prune
    >>> from laconic.tasks import digits
    >>> result = compress(digits_cnn(), digits(), [Prune("weights", keep=0.5)])
    >>> result.history[-1].size_bytes < result.history[0].size_bytes
    True
    """
    recipe = _understood(model, task, steps)
    teachers = _given(teacher, recipe)
    device = pick_device(device)
    # A caller may be inside torch.no_grad or inference_mode; this leaves both.
    with torch.inference_mode(False), ranks.joined(), _shown(progress), ExitStack() as stack:
        recipe.check(model, task)
        check_teachers(recipe, teachers or (model,), task)
        state = State(
            model=as_stored(_described(copied(model))),
            task=task,
            teacher=Teachers(teachers or (model,), device),
            seed=recipe.seed,
            device=device,
            precision=pick_precision(recipe.precision, device),
            recall=0 if recipe.recall is None else bytes_of(recipe.recall),
        )
        facts = _facts(recipe, model, task, state)
        facts["teacher"] = [model_hash(each) for each in teachers]
        keeper = None
        if out is not None:
            keeper = state.keeper = Keeper(Path(out), facts, checkpoint_seconds)
            if ranks.leads():
                stack.enter_context(keeper.locked())
            keeper.prepare(state, resume)
            stack.enter_context(keeper.interruptible())
        state.model.to(device)
        _walk(recipe, state, keeper)
        kept = None if keeper is None else keeper.out
        result = Result(state.model.eval(), tuple(state.history), recipe, task, facts, kept)
        if keeper is not None and ranks.leads():
            _finish(result, keeper)
        ranks.wait()
    return result


def _shown(progress: bool) -> AbstractContextManager[None]:
    """Return what shows progress, in one process of all, where it is asked for."""
    if not (progress and ranks.leads()):
        return nullcontext()
    from laconic.bars import showing  # rich takes its time

    return showing()


def _understood(model: object, task: object, steps: Recipe | Sequence[Step]) -> Recipe:
    """Return the recipe; refuse what is easily given in the place of something else."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"compress takes a network (nn.Module), got {type(model).__name__}; what a recipe "
            "names is loaded by laconic.models.load_model"
        )
    refuse_unusable(model)
    if not isinstance(task, Task | None):
        raise TaskError(
            f"compress takes a Task, got {type(task).__name__}; write Task(train, test), each a "
            "DataLoader or a pair (inputs, targets)"
        )
    if isinstance(steps, Step | str | Path):
        raise RecipeError(
            f"compress takes a list of steps, got {steps!r}; write [step], or read a file, or a "
            "shipped recipe, with Recipe.read(name)"
        )
    return steps if isinstance(steps, Recipe) else Recipe(steps=tuple(steps))


def refuse_unusable(model: nn.Module) -> None:
    """Refuse a network that cannot be copied, changed or computed with.

    Raises:
        ModelError: it is one.

    >>> from laconic.models import digits_cnn
    >>> refuse_unusable(digits_cnn())
    """
    kind, tensors = type(model).__name__, [*model.named_parameters(), *model.named_buffers()]
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{kind} is TorchScript, whose layers cannot be changed; give the module that "
            "it was made of"
        )
    for name, tensor in tensors:
        if is_lazy(tensor):
            raise ModelError(
                f"'{name}' of {kind} has no shape yet; call the network once, on an "
                "example, before it is returned"
            )
        if tensor.is_meta:
            raise ModelError(
                f"'{name}' of {kind} is on the device 'meta' and holds no numbers; load its weights"
            )
    _refuse_overlapping(model)
    try:
        copied(model)
    except Exception as error:
        raise ModelError(
            f"{kind} cannot be copied ({type(error).__name__}: {error}); keep what cannot be out "
            "of the module"
        ) from error


def _refuse_overlapping(model: nn.Module) -> None:
    """Refuse parameters that are views of the same numbers: copies of them go apart."""
    held: dict[int, list[tuple[str, Tensor]]] = {}
    for name, each in model.named_parameters():
        if each.layout is torch.strided and not each.is_nested and each.numel():
            held.setdefault(each.untyped_storage().data_ptr(), []).append((name, each))
    for views in held.values():
        views.sort(key=lambda view: view[1].storage_offset())
        for place, (name, one) in enumerate(views):
            end = _end(one)
            near = [view for view in views[place + 1 :] if view[1].storage_offset() <= end]
            if second := next((other for other, each in near if _overlap(one, each)), None):
                raise ModelError(
                    f"'{name}' and '{second}' are two parameters over the same numbers, which "
                    "would go apart in a copy; make them one parameter, and turn it (weight.t()) "
                    "in the forward"
                )


def _end(view: Tensor) -> int:
    """Return where in memory the last number of a view is, counted in numbers."""
    steps = zip(view.shape, view.stride(), strict=True)
    return int(view.storage_offset()) + sum((size - 1) * step for size, step in steps)


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Return whether two views of one piece of memory have numbers in common."""
    taken = torch.zeros(max(_end(one), _end(other)) + 1, dtype=torch.bool)
    taken.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _given(
    teacher: nn.Module | Sequence[nn.Module] | None, recipe: Recipe
) -> tuple[nn.Module, ...]:
    """Return the teachers that were given; refuse to forget those that a recipe names."""
    if teacher is None and recipe.teacher is not None:
        raise RunError(
            "the recipe names a teacher, which only the command line loads by itself; give "
            "compress(..., teacher=tuple(load_model(each) for each in recipe.teacher))"
        )
    if teacher is None:
        return ()
    given = (teacher,) if isinstance(teacher, nn.Module) else tuple(teacher)
    for each in given:
        if not isinstance(each, nn.Module):
            raise ModelError(
                f"a teacher is a network (nn.Module), got {type(each).__name__}; what a recipe "
                "names is loaded by laconic.models.load_model"
            )
    return given


def _described(model: nn.Module) -> nn.Module:
    """Return a network, noted on it how it is built while it is as it was, if a file can say it."""
    builder = layers_builder(model)
    return model if builder is None else noted(model, builder)


def check_teachers(recipe: Recipe, teachers: Sequence[nn.Module], task: Task | None) -> None:
    """Refuse, before any work, a teacher that is not there or cannot read the data.

    Raises:
        RunError: an objective learns from a teacher that is not there.
        TaskError: the examples cannot be fed to one that is.

    >>> from laconic.recover import Label, Train
    >>> check_teachers(Recipe([Train(Label())]), (), None)
    """
    for index, step in enumerate(recipe.steps):
        asked = sorted({i for objective in inside(step, Objective) for i in objective.teachers})
        with located(index, step, recipe.places):
            if asked and asked[-1] >= len(teachers):
                raise RunError(
                    f"an objective learns from teacher {asked[-1]}, and there are "
                    f"{len(teachers)}, counted from 0; give teacher=(first, second), or a list on "
                    "the 'teacher:' line"
                )
            for number in asked:
                _check_teacher(number, teachers[number], task)


def _check_teacher(number: int, teacher: nn.Module, task: Task | None) -> None:
    """Refuse a teacher that cannot read the data: it is shown an example."""
    if task is None:
        return
    task.check(teacher)
    batch = task.example_batch().to(device_of(teacher))
    with (
        full_precision(teacher),
        explained(
            f"teacher {number} ({type(teacher).__name__}) cannot read the examples of {task.name}",
            "give one that takes what the network takes",
        ),
    ):
        task.call(teacher, batch)


def _walk(recipe: Recipe, state: State, keeper: Keeper | None) -> None:
    """Run and measure every step that the history does not hold yet."""
    if not state.history:
        _measure(state, "original", 0.0)
        if recipe.budget is not None:
            first = vars(state.history[0])
            recipe.budget.exceeded_by(first, first)  # refuses to limit what is not measured
        _keep(keeper, state)
    for index in range(len(state.history) - 1, len(recipe.steps)):
        step = recipe.steps[index]
        began = time.monotonic()
        earlier = sum(other.name == step.name for other in recipe.steps[:index])
        with located(index, step, recipe.places):
            run_step(step, state, key=earlier)
        if keeper is not None:
            began = keeper.began  # after the step: ranks that resume learn in it what went before
        _measure(state, step.name, time.monotonic() - began)
        _keep(keeper, state)


def _measure(state: State, label: str, seconds: float) -> None:
    measured = measuring.measure(
        state.model, state.task, step=label, seconds=seconds, curves=state.curves
    )
    state.curves = {}
    state.history.append(measured)
    scores = [f"{name} {value:.4f}" for name, value in measured.metrics.items()]
    facts = ", ".join([f"{measured.size_bytes} bytes", *scores])
    logger.info("%s: %s (%.1f s)", label, facts, seconds)
    if not math.isfinite(measured.metrics.get("loss", 0.0)):
        logger.warning(
            "%s: the loss is not finite: the network overflows or divides by nothing, which no "
            "later step mends; lower the step's learning rate, or compress less",
            label,
        )


def _keep(keeper: Keeper | None, state: State) -> None:
    if keeper is not None:
        keeper.began = time.monotonic()
        keeper.write(state, {})
        ranks.wait()  # what the first has written holds what all have made
        keeper.forget_part()


def _facts(recipe: Recipe, model: nn.Module, task: Task | None, state: State) -> dict[str, Any]:
    here = {"device": state.device, "trained_in": state.precision}
    return {
        "recipe": recipe.to_yaml(),
        "seed": recipe.seed,
        "model_hash": model_hash(model),
        "task": None if task is None else task.describe(),
        "environment": measuring.environment() | here,
        "notes": [],
    }


def _finish(result: Result, keeper: Keeper) -> None:
    with keeper.writing():
        result.save(keeper.out / ARTIFACT)
        result.report(keeper.out / REPORT)
    verify(keeper.out / ARTIFACT)


def pick_device(asked: str | None) -> str:
    """Return the device to compute on: the one asked for, or a GPU when present.

    Raises:
        RunError: there is no such device.

    >>> pick_device("cpu")
    'cpu'
    """
    if asked is None and torch.cuda.is_available():
        return ranks.gpu()
    if asked is None:
        return "cpu"
    try:
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError) as error:
        kinds = "Expected one of" in str(error)  # torch goes on with all it has ever known
        first = "there is no such kind" if kinds else str(error).partition("\n")[0]
        raise RunError(
            f"device '{asked}' cannot be used here ({first}); give cpu, which always can, or "
            "cuda for a GPU"
        ) from None
    return asked


def pick_precision(asked: str, device: str) -> str:
    """Return what training forwards run in: "bfloat16" or "float32".

    Args:
        asked: one of them, or "auto": bfloat16 where the device computes fast in it.
        device: such as "cpu" or "cuda:0".

    >>> pick_precision("float32", "cpu")
    'float32'
    """
    if asked != "auto":
        return asked
    kind = torch.device(device).type
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        processor = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        fast = kind == "cpu" and processor
    return "bfloat16" if fast else "float32"
