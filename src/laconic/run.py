"""compress(): run a recipe on a network, measure every step, survive a crash."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from laconic import measure as measuring
from laconic import ranks
from laconic.budget import bytes_of
from laconic.errors import ModelError, RecipeError, RunError, TaskError
from laconic.ledger import Measurement
from laconic.recipe import Recipe, located
from laconic.recover.lesson import Teachers
from laconic.recover.objectives import Objective
from laconic.ship.artifact import save
from laconic.ship.checkpoint import load_checkpoint, model_hash, save_checkpoint
from laconic.ship.container import read, write, write_file
from laconic.ship.verification import verify
from laconic.step import State, Step, inside, run_step
from laconic.tasks.task import Task, device_of, explained, full_precision
from laconic.weights.laid import baked, copied

__all__ = ["Result", "check_teachers", "compress", "pick_device", "pick_precision", "read_history"]

logger = logging.getLogger(__name__)

ARTIFACT = "model.safetensors"
CHECKPOINT = "checkpoint.safetensors"
PART = "checkpoint-{}.safetensors"  # of each rank, while the ranks share their work
SCRATCH = "scratch-{}"  # of each rank, for what a step keeps on disk while it runs
HISTORY = "history.json"
RECIPE = "recipe.yaml"
RUN = "run.json"
REPORT = "report.html"


@dataclasses.dataclass(frozen=True)
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
        first, last = (dataclasses.asdict(self.history[i]) for i in (0, -1))
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
    Ctrl-C writes a checkpoint first; a second one stops at once.

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
    recipe.check(model, task)
    check_teachers(recipe, teachers or (model,), task)
    device = pick_device(device)
    # A caller may be inside torch.no_grad or inference_mode; this leaves both.
    with torch.inference_mode(False), ranks.joined(), _shown(progress), ExitStack() as stack:
        state = State(
            model=copied(model),
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
            if ranks.leads():
                stack.enter_context(_locked(Path(out)))
            keeper = state.keeper = _Keeper(Path(out), facts, checkpoint_seconds)
            _prepare(keeper, state, resume)
            stack.enter_context(_interruptible(keeper))
        state.model.to(device)
        _walk(recipe, state, keeper)
        kept = None if keeper is None else keeper.out
        result = Result(state.model.eval(), tuple(state.history), recipe, task, facts, kept)
        if keeper is not None and ranks.leads():
            _finish(result, keeper.out)
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


def _walk(recipe: Recipe, state: State, keeper: _Keeper | None) -> None:
    """Run and measure every step that the history does not hold yet."""
    if not state.history:
        _measure(state, "original", 0.0)
        _keep(keeper, state)
    for index in range(len(state.history) - 1, len(recipe.steps)):
        step = recipe.steps[index]
        began = time.monotonic() if keeper is None else keeper.began
        earlier = sum(other.name == step.name for other in recipe.steps[:index])
        with located(index, step, recipe.places):
            run_step(step, state, key=earlier)
        _measure(state, step.name, time.monotonic() - began)
        _keep(keeper, state)


def _measure(state: State, label: str, seconds: float) -> None:
    measured = measuring.measure(
        state.model, state.task, step=label, seconds=seconds, curves=state.curves
    )
    state.curves = {}
    state.history.append(measured)
    scores = ", ".join(f"{name} {value:.4f}" for name, value in measured.metrics.items())
    logger.info("%s: %d bytes, %s (%.1f s)", label, measured.size_bytes, scores, seconds)


def _keep(keeper: _Keeper | None, state: State) -> None:
    if keeper is not None:
        keeper.began = time.monotonic()
        keeper.write(state, {})
        ranks.wait()  # what the first has written holds what all have made
        keeper.forget_part()


class _Keeper:
    """Writes the checkpoint, whole or not at all, when time has passed or the user asks."""

    def __init__(self, out: Path, facts: dict[str, Any], seconds: float) -> None:
        self.out, self.facts, self.seconds = out, facts, seconds
        self.interrupted = False
        self.last = time.monotonic()
        # When the running step began, were it not for what came between.
        self.began = self.last

    def due(self) -> bool:
        return self.interrupted or time.monotonic() - self.last >= self.seconds

    def write(self, state: State, training: dict[str, Any]) -> None:
        if ranks.leads():
            self._write(state, training)
        self.last = time.monotonic()
        if self.interrupted:
            raise KeyboardInterrupt

    def _write(self, state: State, training: dict[str, Any]) -> None:
        history = [measured.to_data() for measured in state.history]
        run = {
            "history": history,
            "facts": self.facts,
            "seconds": time.monotonic() - self.began,
            "curves": state.curves,
        }
        with _writing(self.out):
            save_checkpoint(state, training, self.out / CHECKPOINT, run=run)
            write_file(self.out / HISTORY, json.dumps(history, indent=1).encode())

    def write_part(
        self, state: State, counters: dict[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        seconds = time.monotonic() - self.began
        manifest = {"counters": counters, "curves": state.curves, "seconds": seconds}
        with _writing(self.out):
            write(self._part, {"run": self._stamp(state), "part": manifest}, tensors)
        self.last = time.monotonic()
        if self.interrupted:
            raise KeyboardInterrupt

    def read_part(self, state: State) -> tuple[dict[str, Any], dict[str, Tensor]]:
        manifest, tensors = read(self._part) if self._part.is_file() else ({}, {})
        if manifest.get("run") != self._stamp(state):
            return {}, {}
        part = manifest["part"]
        state.curves.update(part["curves"])
        self.began -= part["seconds"]
        return part["counters"], tensors

    def forget_part(self) -> None:
        self._part.unlink(missing_ok=True)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        folder = self.out / SCRATCH.format(ranks.rank())
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        with _writing(self.out):
            folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def _part(self) -> Path:
        return self.out / PART.format(ranks.rank())

    def _stamp(self, state: State) -> list[Any]:
        """Return what tells the same step of the same run on as many ranks."""
        facts = [self.facts[key] for key in ("model_hash", "task", "teacher")]
        where = [state.seed, len(state.history), ranks.count()]
        return [_method(self.facts["recipe"]), *facts, *where]


def _prepare(keeper: _Keeper, state: State, resume: bool) -> None:
    """Start a run directory, or take one up again where its checkpoint was written."""
    path = keeper.out / CHECKPOINT
    if path.is_file():
        if not resume:
            raise RunError(
                f"{keeper.out} holds a run already; resume it, or choose another directory"
            )
        # Compared first: torch would refuse a network of other shapes in its own words.
        run = _recorded(path)
        _same_run(keeper, run["facts"])
        load_checkpoint(state, path)
        state.history = [Measurement.from_data(item) for item in run["history"]]
        state.curves = run.get("curves", {})
        keeper.began -= run["seconds"]
    ranks.wait()  # all have read before anything is written
    if ranks.leads():
        _begin(keeper)


def _begin(keeper: _Keeper) -> None:
    with _writing(keeper.out):
        # First what tells that the folder is that of a run.
        write_file(keeper.out / RUN, json.dumps(keeper.facts, indent=1).encode())
        write_file(keeper.out / RECIPE, keeper.facts["recipe"].encode())


def _recorded(path: Path) -> dict[str, Any]:
    """Return the facts of the run that a checkpoint holds."""
    run = read(path)[0].get("run")
    if not isinstance(run, dict):
        raise RunError(f"{path} is no checkpoint of a run; choose another directory")
    return run


def _same_run(keeper: _Keeper, before: dict[str, Any]) -> None:
    now = keeper.facts
    if _method(before["recipe"]) != _method(now["recipe"]):
        raise RunError(
            f"{keeper.out}: was run with another recipe; resume with that one, or choose another "
            "directory"
        )
    for key, name in (("model_hash", "network"), ("task", "task"), ("teacher", "teacher")):
        if before.get(key, []) != now[key]:
            raise RunError(
                f"{keeper.out}: was run with another {name}; resume with that one, or choose "
                "another directory"
            )
    changed = {
        key: (before["environment"].get(key), value)
        for key, value in now["environment"].items()
        if before["environment"].get(key) != value
    }
    now["notes"] = before["notes"]
    if changed:
        text = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items())
        note = f"resumed under other conditions ({text}): the bytes of the artefact may differ"
        logger.warning(note)
        now["notes"] = [*before["notes"], note]


def _method(recipe: str) -> dict[str, Any]:
    """Return a recipe's text without networks and data, which are compared by what they hold."""
    found: dict[str, Any] = yaml.safe_load(recipe)
    return {key: value for key, value in found.items() if key not in ("model", "task", "teacher")}


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


def _finish(result: Result, out: Path) -> None:
    with _writing(out):
        result.save(out / ARTIFACT)
        result.report(out / REPORT)
    verify(out / ARTIFACT)


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
        first = str(error).partition("\n")[0]
        raise RunError(f"device '{asked}' cannot be used here ({first}); cpu always can") from None
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


def read_history(out: str | Path) -> tuple[tuple[Measurement, ...], dict[str, Any]]:
    """Return the history and the facts of a run directory.

    Raises:
        RunError: it holds no readable run.

    >>> import tempfile
    >>> from laconic.models import digits_cnn
    >>> from laconic.structure import Prune
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = compress(digits_cnn(), None, [Prune("weights", keep=0.5)], out=folder)
    ...     history, facts = read_history(folder)
    >>> len(history), facts["seed"]
    (2, 0)
    """
    out = Path(out)
    try:
        history = json.loads((out / HISTORY).read_text(encoding="utf-8"))
        facts = json.loads((out / RUN).read_text(encoding="utf-8"))
        return tuple(Measurement.from_data(item) for item in history), facts
    except FileNotFoundError as error:
        raise RunError(f"{out} holds no run ({Path(error.filename).name} is missing)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{out}: the run cannot be read ({error})") from None


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Say what to do where the operating system refuses to write."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{out}: the run cannot be kept there ({error}); make room, or choose another "
            "directory. A run that has begun goes on from its checkpoint when it is resumed"
        ) from error


def _check_folder(out: Path) -> None:
    """Refuse a folder whose files a run would write over.

    They are those that are not of a run, and the network of one that cannot be taken up again.
    """
    kept = (RECIPE, RUN, ARTIFACT, CHECKPOINT, HISTORY, REPORT)
    there = [name for name in kept if (out / name).exists()]
    if there and not _is_run(out / RUN):
        raise RunError(
            f"{out} is not the folder of a run and holds {there[0]}, which would be lost; choose "
            "another directory"
        )
    if ARTIFACT in there and CHECKPOINT not in there:
        raise RunError(
            f"{out} holds the {ARTIFACT} of a run whose {CHECKPOINT} is gone, and it would be "
            "lost; choose another directory"
        )


def _is_run(path: Path) -> bool:
    """Return whether a file holds the facts of a run."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and {"recipe", "model_hash"} <= facts.keys()


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with _writing(out):
        _check_folder(out)
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{out} is in use by another run; choose another directory") from None
        yield


@contextmanager
def _interruptible(keeper: _Keeper) -> Iterator[None]:
    """Turn the first Ctrl-C into a checkpoint at the next update; the second stops at once."""
    before = signal.getsignal(signal.SIGINT)
    # Signals reach the main thread alone; what ignores them, such as a background job, goes on.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def ask(number: int, frame: Any) -> None:
        keeper.interrupted = True
        signal.signal(signal.SIGINT, before)
        logger.warning("interrupted: writing a checkpoint; once more to stop at once")

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
