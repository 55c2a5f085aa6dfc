"""The commands that run a recipe: demo and compress."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laconic.cli.command import DONE, EXCEEDED, STOPPED, command
from laconic.cli.output import Output
from laconic.cli.shared import Threads, folder, tell_ledger, tokenizer_in, use
from laconic.errors import RecipeError, TaskError

if TYPE_CHECKING:
    from torch import nn

    from laconic.cli.predict import Prediction
    from laconic.recipe import Recipe
    from laconic.run import Result
    from laconic.tasks import Task

__all__ = ["compress", "demo"]

DEMO = Path("laconic-demo")
# What shipped recipes write where a user's own paths belong.
PLACEHOLDER = "path/to/"

Name = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A file, or the name of a shipped recipe.")
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", parser=folder, help="Where the run goes; runs/NAME by default."
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        metavar="",
        help="Go on from the last checkpoint in DIR, also with steps added at the end.",
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change one value; may be repeated."),
]
Check = Annotated[
    bool,
    typer.Option(
        "--check", metavar="", help="Check that all fits, predict size and time; train nothing."
    ),
]
Model = Annotated[
    str | None, typer.Option(metavar="YAML", help="The network, instead of the recipe's.")
]
Teacher = Annotated[
    str | None,
    typer.Option(metavar="YAML", help="What the network learns from; itself as it is by default."),
]
Data = Annotated[
    str | None, typer.Option(metavar="YAML", help="The data, instead of the recipe's.")
]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="cpu or cuda; a GPU where there is one.")
]


@command("demo", "demo --out demo")
def demo(
    output: Output,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the run goes.")] = DEMO,
    threads: Annotated[
        int, typer.Option(min=1, metavar="N", help="Threads; so small a network needs one.")
    ] = 1,
) -> int:
    """Train, compress, reload, verify and report, on data that come along.

    The data are scikit-learn's digits; it takes less than a minute. The folder is replaced when
    the demonstration is run again.
    """
    use(threads)
    from laconic.cli.demo import ORIGINAL, demonstrate

    with output.working(about="laconic.run"):
        result = demonstrate(out, output)
    output.line()
    code = _tell(output, result)
    weights = f"{{digits_cnn: {{weights: {out / ORIGINAL}}}}}"
    again = ["laconic", "compress", "deep-compression", "--model", weights, "--out", "runs/1"]
    output.line(f"\nThe same by hand:\n  {shlex.join(again)}")
    return code


@command(
    "compress deep-compression --check",
    "compress recipe.yaml --out runs/1 --set steps.1.train.epochs=1",
    "compress deep-compression --model lenet_5 --task '{mnist: data/mnist}'",
)
def compress(
    output: Output,
    recipe: Name,
    out: Folder = None,
    resume: Resume = False,
    changes: Changes = None,
    check: Check = False,
    model: Model = None,
    task: Data = None,
    teacher: Teacher = None,
    device: Device = None,
    threads: Threads = None,
) -> int:
    """Run a recipe on a network.

    What it makes is kept in a folder: model.safetensors, which is the network, report.html,
    history.json and recipe.yaml. Ctrl-C, or SIGTERM, writes a checkpoint there, from which
    --resume goes on.

    Paths in a recipe start at its folder, those of --model, --task and --teacher at yours.

    Exit code: 0; 1 where the result exceeds the recipe's budget; 2 where something is wrong; 130
    after Ctrl-C.
    """
    from laconic.run import pick_device

    use(threads)
    given = {"model": model, "task": task, "teacher": teacher}
    settings = [
        *(changes or ()),
        *(f"{key}={text}" for key, text in given.items() if text is not None),
    ]
    computed_on = pick_device(device)
    job = _read(recipe, settings)
    if job.task is None:
        output.note("no task: nothing is scored")
    if check:
        return _check(output, job, computed_on)
    where = out or Path("runs") / job.name
    try:
        result = _run(output, job, out=where, resume=resume, device=computed_on)
    except KeyboardInterrupt:
        output.error(_how_to_resume(recipe, where, settings, device=device, threads=threads))
        return STOPPED
    return _tell(output, result)


def _run(output: Output, job: _Job, *, out: Path, resume: bool, device: str) -> Result:
    from laconic.run import compress as run

    with output.working():
        return run(
            job.model,
            job.task,
            job.recipe,
            teacher=job.teachers or None,
            out=out,
            resume=resume,
            device=device,
        )


@dataclass(frozen=True)
class _Job:
    """A recipe with the networks and the data it names."""

    name: str
    recipe: Recipe
    model: nn.Module
    task: Task | None
    teachers: tuple[nn.Module, ...]


def _read(name: str, settings: Sequence[str]) -> _Job:
    from laconic.cli.own_code import own_code
    from laconic.recipe import Recipe, find_recipe
    from laconic.tasks import task_from_dict

    path = find_recipe(name)
    _refuse_networks(path)
    recipe = Recipe.read(path, changes=settings)
    if recipe.model is None:
        raise RecipeError(f"{path}: no network is named; add a 'model:' line, or give --model")
    left_open = _left_open(path, recipe)
    if left_open.keys() - {"task"}:
        raise _asking(path, left_open)
    # What was given whole on the command line is meant from where the user stands.
    given = {setting.partition("=")[0].strip() for setting in settings}
    bases = {key: Path() if key in given else path.parent for key in ("model", "task", "teacher")}
    model, *teachers = _networks(recipe, bases)
    if left_open:
        recipe = _without_task(recipe, model, _asking(path, left_open))
    task = None
    if recipe.task is not None:
        tokenizer = _tokenizer(recipe.model, bases["model"])
        with own_code("task", recipe.task):
            task = task_from_dict(recipe.task, base=bases["task"], tokenizer=tokenizer)
    return _Job(path.stem, _anchored(recipe, bases), model, task, tuple(teachers))


def _tokenizer(line: Any, base: Path) -> Any:
    """Return what reads texts, where the network brings it: a Hugging Face folder, or a file."""
    from laconic.models.load import artifact_of

    if isinstance(line, dict) and "hf" in line:
        return base.absolute() / str(line["hf"])
    path = artifact_of(line, base)
    return None if path is None else tokenizer_in(path)


def _networks(recipe: Recipe, bases: Mapping[str, Path]) -> list[nn.Module]:
    """Return the network of a recipe, then its teachers."""
    import torch

    from laconic.cli.own_code import own_code
    from laconic.models import load_model
    from laconic.run import refuse_unusable
    from laconic.step import derive

    lines = [("model", recipe.model or ""), *(("teacher", line) for line in recipe.teacher or ())]
    found = []
    with torch.random.fork_rng(devices=[]):
        # A network without trained weights is drawn: by the recipe's seed, as everything is.
        torch.manual_seed(derive(recipe.seed, "model"))
        for key, line in lines:
            with own_code(key, line):
                found.append(load_model(line, base=bases[key]))
    refuse_unusable(found[0])
    return found


def _anchored(recipe: Recipe, bases: Mapping[str, Path]) -> Recipe:
    """Return a recipe that names the same networks and data from the folder of its run."""
    from laconic.models.load import anchored_model
    from laconic.tasks.line import anchored_task

    named: dict[str, Any] = {}
    if recipe.model is not None:
        named["model"] = anchored_model(recipe.model, bases["model"])
    if recipe.task is not None:
        named["task"] = anchored_task(recipe.task, bases["task"])
    if recipe.teacher is not None:
        named["teacher"] = tuple(anchored_model(each, bases["teacher"]) for each in recipe.teacher)
    return recipe.model_copy(update=named)


def _refuse_networks(path: Path) -> None:
    """Refuse a file that is no text, such as a network."""
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(
            f"{path} is no recipe, which is a text (YAML or JSON); to go on from a network, name a "
            f"recipe and give --model '{{\"laconic:load\": {{path: {path}}}}}'"
        ) from None


def _left_open(path: Path, recipe: Recipe) -> dict[str, str]:
    """Return what a shipped recipe leaves the user to name: its key -> the option for it."""
    from laconic.recipe import shipped_recipes

    if path not in shipped_recipes().values():
        return {}
    lines = {key: getattr(recipe, key) for key in ("model", "task", "teacher")}
    return {
        key: f"--{key} '{_written(line)}'"
        for key, line in lines.items()
        if PLACEHOLDER in str(line)
    }


def _asking(path: Path, left_open: Mapping[str, str]) -> RecipeError:
    """Return the error that asks for what a recipe leaves open."""
    unsure = len(left_open) > 1 and "task" in left_open
    return RecipeError(
        f"the recipe '{path.stem}' leaves open what it is run on; give, with paths of your own, "
        f"{' '.join(left_open.values())}"
        f"{'; --task may be left out where no step needs data' if unsure else ''}"
    )


def _without_task(recipe: Recipe, model: nn.Module, refusal: RecipeError) -> Recipe:
    """Return a recipe without the task that it leaves open, unless a step needs one."""
    try:
        recipe.check(model, None)
    except TaskError:
        raise refusal from None
    return recipe.model_copy(update={"task": None})


def _written(line: Any) -> str:
    import yaml

    one = line[0] if isinstance(line, tuple) and len(line) == 1 else line
    data = list(one) if isinstance(one, tuple) else one
    return str(yaml.safe_dump(data, default_flow_style=True, width=math.inf)).strip()


def _check(output: Output, job: _Job, device: str) -> int:
    from laconic.cli.predict import predict

    job.recipe.check(job.model, job.task)
    found = predict(job.recipe, job.model, job.task, device=device, teachers=job.teachers)
    steps = ", ".join(step.name for step in job.recipe.steps)
    output.line(f"{job.name} fits: {steps}")
    output.event("result", **dataclasses.asdict(found), seconds=found.seconds)
    _tell_prediction(output, found)
    return _budget(output, job.recipe, found.exceeded, "will be")


def _tell_prediction(output: Output, found: Prediction) -> None:
    from laconic.ledger import factor_text, size_text

    first = found.rows[0]
    codes = [factor_text(first.nominal_bytes / row.nominal_bytes) for row in found.rows]
    files = [factor_text(first.size_bytes / row.size_bytes) for row in found.rows]
    rows = [
        (row.step, size_text(row.size_bytes), *factors, f"{row.updates:,}", _about(row.seconds))
        for row, *factors in zip(found.rows, codes, files, strict=True)
    ]
    columns = ("Step", "Predicted size", "Codes alone, all", "File, all", "Updates", "Training")
    output.line()
    output.table(columns, rows)
    output.line(
        f"\nPredicted: a file about {files[-1]} smaller (codes alone, as papers count: "
        f"{codes[-1]}), after about {_about(found.seconds)} of training."
    )


def _about(seconds: float) -> str:
    """Return a rough time for people to read."""
    if seconds < 100:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _tell(output: Output, result: Result) -> int:
    """Print what a run gave, and return the exit code."""
    from laconic.ledger import factor_text, ledger, size_text
    from laconic.rundir import ARTIFACT, REPORT

    out = result.out or Path()
    size = (out / ARTIFACT).stat().st_size
    ratio = result.history[0].size_bytes / size
    exceeded = result.exceeded()
    output.event(
        "result",
        artefact=out / ARTIFACT,
        report=out / REPORT,
        size_bytes=size,
        ratio=ratio,
        exceeded=exceeded,
        ledger=[dataclasses.asdict(row) for row in ledger(result.history)],
    )
    tell_ledger(output, result.history)
    shown = f"{size_text(size)}, {factor_text(ratio)} smaller"
    output.line(f"\nnetwork  {out / ARTIFACT}  {shown}")
    output.line(f"report   {out / REPORT}")
    return _budget(output, result.recipe, exceeded, "is")


def _budget(output: Output, recipe: Recipe, exceeded: dict[str, float], when: str) -> int:
    from laconic.ledger import excess_text

    if recipe.budget is None:
        return DONE
    if not exceeded:
        output.line(f"the budget '{recipe.budget}' {when} met")
        return DONE
    output.error(f"the budget '{recipe.budget}' {when} exceeded by {excess_text(exceeded)}")
    return EXCEEDED


def _how_to_resume(
    recipe: str, out: Path, settings: Sequence[str], *, device: str | None, threads: int | None
) -> str:
    from laconic.rundir import CHECKPOINT

    if not (out / CHECKPOINT).is_file():
        return "stopped before anything was done"
    again = ["laconic", "compress", recipe, "--out", str(out), "--resume"]
    for setting in settings:
        again += ["--set", setting]
    if device is not None:
        again += ["--device", device]
    if threads is not None:
        again += ["--threads", str(threads)]
    return f"stopped; go on with: {shlex.join(again)}"
