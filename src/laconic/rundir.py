"""The run directory: what a run keeps there, and how it is taken up again."""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from laconic import ranks
from laconic.errors import RunError
from laconic.ledger import Measurement
from laconic.ship.checkpoint import load_checkpoint, save_checkpoint
from laconic.ship.container import read, write, write_file
from laconic.step import State

__all__ = [
    "ARTIFACT",
    "CHECKPOINT",
    "FILES",
    "HISTORY",
    "RECIPE",
    "REPORT",
    "RUN",
    "Keeper",
    "read_history",
]

logger = logging.getLogger(__name__)

ARTIFACT = "model.safetensors"
CHECKPOINT = "checkpoint.safetensors"
PART = "checkpoint-{}.safetensors"  # of each rank, while the ranks share their work
SCRATCH = "scratch-{}"  # of each rank, for what a step keeps on disk while it runs
HISTORY = "history.json"
RECIPE = "recipe.yaml"
RUN = "run.json"
REPORT = "report.html"
FILES = (RECIPE, RUN, ARTIFACT, CHECKPOINT, HISTORY, REPORT)


class Keeper:
    """Writes the checkpoint, whole or not at all, when it is time or the user asks.

    Args:
        out: the run directory.
        facts: of the run.
        seconds: between two checkpoints.

    >>> Keeper(Path("run"), {}, seconds=300).due()
    False
    """

    def __init__(self, out: Path, facts: dict[str, Any], seconds: float) -> None:
        self.out, self.facts, self.seconds = out, facts, seconds
        self.interrupted = False
        self.last = time.monotonic()
        # When the running step began, were it not for what came between.
        self.began = self.last

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of a folder, and this one out of a folder that is no run's."""
        with _writing(self.out):
            _check_folder(self.out)
            self.out.mkdir(parents=True, exist_ok=True)
            file = (self.out / ".lock").open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"{self.out} is in use by another run; choose another directory"
                ) from None
            yield

    def prepare(self, state: State, resume: bool) -> None:
        """Start the directory, or take it up again where its checkpoint was written."""
        path = self.out / CHECKPOINT
        if path.is_file():
            if not resume:
                raise RunError(
                    f"{self.out} holds a run already; resume it (resume=True, or --resume), or "
                    "choose another directory"
                )
            # Compared first: torch would refuse a network of other shapes in its own words.
            run = _recorded(path)
            _same_run(self, run["facts"])
            load_checkpoint(state, path)
            state.history = [Measurement.from_data(item) for item in run["history"]]
            state.curves = run["curves"]
            self.began -= run["seconds"]
        ranks.wait()  # all have read before anything is written
        if ranks.leads():
            _begin(self)
            if state.history:  # the run may have ended between its checkpoint and this file
                with _writing(self.out):
                    self._write_history(state)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Turn the first Ctrl-C, or SIGTERM, into a checkpoint at the next update."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        # What ignores Ctrl-C, such as a background job, goes on; handlers of the user's own stay.
        taken = [signal.SIGINT] if callable(before[signal.SIGINT]) else []
        taken += [signal.SIGTERM] if before[signal.SIGTERM] is signal.SIG_DFL else []
        if threading.current_thread() is not threading.main_thread():
            taken = []  # signals reach that alone

        def restore() -> None:
            for number in taken:
                signal.signal(number, before[number])

        def ask(number: int, frame: Any) -> None:
            self.interrupted = True
            restore()
            logger.warning("interrupted: writing a checkpoint; once more to stop at once")

        for number in taken:
            signal.signal(number, ask)
        try:
            yield
        finally:
            restore()

    def due(self) -> bool:
        """Return whether time has passed, or the user asks."""
        return self.interrupted or time.monotonic() - self.last >= self.seconds

    def write(self, state: State, training: dict[str, Any]) -> None:
        """Write where the run stands; then stop, if the user has asked for it."""
        if ranks.leads():
            self._write(state, training)
        self.last = time.monotonic()
        if self.interrupted:
            raise KeyboardInterrupt

    def _write(self, state: State, training: dict[str, Any]) -> None:
        run = {
            "history": [measured.to_data() for measured in state.history],
            "facts": self.facts,
            "seconds": time.monotonic() - self.began,
            "curves": state.curves,
        }
        with _writing(self.out):
            save_checkpoint(state, training, self.out / CHECKPOINT, run=run)
            self._write_history(state)

    def _write_history(self, state: State) -> None:
        history = [measured.to_data() for measured in state.history]
        write_file(self.out / HISTORY, json.dumps(history, indent=1).encode())

    def write_part(
        self, state: State, counters: dict[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        """Write what this rank needs to go on, curves and time included."""
        seconds = time.monotonic() - self.began
        manifest = {"counters": counters, "curves": state.curves, "seconds": seconds}
        with _writing(self.out):
            write(self._part, {"run": self._stamp(state), "part": manifest}, tensors)
        self.last = time.monotonic()
        if self.interrupted:
            raise KeyboardInterrupt

    def read_part(self, state: State) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what this rank wrote in this step of this run, or nothing."""
        manifest, tensors = read(self._part) if self._part.is_file() else ({}, {})
        if manifest.get("run") != self._stamp(state):
            return {}, {}
        part = manifest["part"]
        state.curves.update(part["curves"])
        self.began -= part["seconds"]
        return part["counters"], tensors

    def forget_part(self) -> None:
        """Delete what this rank wrote."""
        self._part.unlink(missing_ok=True)

    def writing(self) -> AbstractContextManager[None]:
        """Say what to do where the operating system refuses to write, inside a with block."""
        return _writing(self.out)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give this rank an empty folder, inside a with block."""
        folder = self.out / SCRATCH.format(ranks.rank())
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        with _writing(self.out):
            folder.mkdir(parents=True)  # a rank may be on another machine
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


def _begin(keeper: Keeper) -> None:
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


def _same_run(keeper: Keeper, before: dict[str, Any]) -> None:
    now = keeper.facts
    old, new = _method(before["recipe"]), _method(now["recipe"])
    if new | {"steps": new["steps"][: len(old["steps"])]} != old:
        raise RunError(
            f"{keeper.out}: was run with another recipe; resume with that one, to which steps may "
            "be added at its end, or choose another directory"
        )
    for key, name in (("model_hash", "network"), ("task", "task"), ("teacher", "teacher")):
        if before[key] != now[key]:
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


def read_history(out: str | Path) -> tuple[tuple[Measurement, ...], dict[str, Any]]:
    """Return the history and the facts of a run directory.

    Raises:
        RunError: it holds no readable run.

    >>> import tempfile
    >>> from laconic.models import digits_cnn
    >>> from laconic.run import compress
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
        if not isinstance(facts, dict) or not isinstance(history, list):
            raise RunError(
                f"{out}: the run cannot be read ({HISTORY} is no list, or {RUN} no facts)"
            )
        return tuple(Measurement.from_data(item) for item in history), facts
    except FileNotFoundError as error:
        raise RunError(f"{out} holds no run ({Path(error.filename).name} is missing)") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; a run is kept in a directory, choose another name")
    there = [name for name in FILES if (out / name).exists()]
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
