"""Parts of a network learn one after the other, or all at once (Bai et al. 2022, MREM)."""

from __future__ import annotations

import itertools
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laconic.errors import RunError
from laconic.machine import free_memory
from laconic.progress import progress
from laconic.recover.fitting import EXAMPLES, Fitting
from laconic.recover.stream import Data, Flow, Source, Stored, flattened, restored
from laconic.step import State, derive

__all__ = ["data_of", "fit_all_at_once", "fit_in_order"]


def data_of(fitting: Fitting) -> Data:
    """Return what enters the first part."""
    state, solve = fitting.state, fitting.solve
    return Data(
        fitting.task.train, solve.batch, limit=solve.steps, seed=state.seed, device=state.device
    )


def fit_in_order(fittings: Sequence[Fitting], state: State) -> None:
    """Fit one part after the other, each fed by those that are done (MREM-S).

    What leaves the parts that are done is computed once and kept on disk, in a folder that goes
    in the end, whatever happens.

    Args:
        fittings: all parts.
        state: of the run; an interrupted part goes on where it stopped.

    Raises:
        RunError: a loss is not finite; the disk is full.
    """
    source: Source = data_of(fittings[0])
    passed = 0
    with tempfile.TemporaryDirectory(prefix="laconic-") as folder:
        for index in state.rounds(len(fittings)):
            for number in range(passed, index):
                flows = (fittings[number].passed(flow) for flow in source.each())
                kept = Stored(Path(folder) / str(number), flows, state.device)
                source.close()
                source = kept
            passed = index
            _fit(fittings[index], source, state)


def _fit(fitting: Fitting, source: Source, state: State) -> None:
    """Take all updates of a part that are left."""
    _restore([fitting], state)
    fitting.begin()
    flows = source.flows(derive(state.seed, "flows", fitting.number[0]), fitting.finished)
    for _ in _ticks(fitting):
        fitting.update(next(flows))
        _keep([fitting], state)
    fitting.finish()


def fit_all_at_once(fittings: Sequence[Fitting], state: State, size: int) -> None:
    """Let all parts take an update in turn, each fed by what it was sent lately (MREM-P).

    Every part but the first has a queue, full of the teacher's features at first. It draws its
    batches from there, with replacement, and pushes what it makes of them to the next queue,
    which forgets its oldest. One process, so the numbers are the same every time.

    Args:
        fittings: all parts.
        state: of the run; interrupted fittings go on where they stopped.
        size: of a queue, in batches.

    Raises:
        RunError: the queues do not fit into memory; a loss is not finite.
    """
    check_memory(fittings, size, state.device)
    data = data_of(fittings[0])
    queues = _restore(fittings, state, size) or _filled(fittings, data, size)
    for fitting in fittings:
        fitting.begin()
    flows = data.flows(derive(state.seed, "flows", 1), fittings[0].finished)
    for _ in zip(*(_ticks(fitting) for fitting in fittings), strict=True):
        for place, fitting in enumerate(fittings):
            flow = drawn(queues[place - 1], fitting) if place else next(flows)
            sent = fitting.update(flow)
            if place < len(queues):
                queues[place].append(sent)
        _keep(fittings, state, queues)
    for fitting in fittings:
        fitting.finish()


def drawn(queue: deque[Flow], fitting: Fitting) -> Flow:
    """Return the batch that a fitting draws from its queue for its next update."""
    generator = fitting.state.generator("queue", fitting.number[0], fitting.finished)
    return queue[int(torch.randint(len(queue), (), generator=generator))]


def _filled(fittings: Sequence[Fitting], data: Data, size: int) -> list[deque[Flow]]:
    """Return a queue for every part but the first, full of the teacher's features."""
    queues: list[deque[Flow]] = [deque(maxlen=size) for _ in fittings[1:]]
    seed = derive(fittings[0].state.seed, "fill")
    for flow in itertools.islice(data.flows(seed), size):
        for fitting, queue in zip(fittings, queues, strict=False):
            flow = fitting.taught(flow)
            queue.append(flow)
    return queues


def check_memory(fittings: Sequence[Fitting], size: int, device: str) -> None:
    """Refuse queues that would not fit into the memory that is free.

    Args:
        fittings: all parts.
        size: of a queue, in batches.
        device: where the queues live.

    Raises:
        RunError: they are larger.
    """
    batch = fittings[0].task.example_batch(EXAMPLES).to(device)
    flow, one = Flow(batch, batch, {}), 0
    for fitting in fittings[:-1]:
        flow = fitting.passed(flow)
        one += flow.nbytes
    examples = len(flow.teacher) if len(fittings) > 1 else 1
    wanted = one * size * fittings[0].solve.batch // examples
    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else free_memory()
    if wanted > free:
        raise RunError(
            f"reconstruct: queues of {size} batches for {len(fittings)} parts take "
            f"{wanted / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free; write "
            f"parallel: {max(1, size * free // wanted)}, or a smaller batch"
        )


def _ticks(fitting: Fitting) -> Iterator[int]:
    """Return the updates that are left to a part, for all to see."""
    left = range(fitting.finished, fitting.solve.steps)
    return progress(left, "reconstruct part {} of {}".format(*fitting.number), len(left))


# ------------------------------------------------------------------ checkpoints


def _keep(fittings: Sequence[Fitting], state: State, queues: Sequence[deque[Flow]] = ()) -> None:
    """Let the run directory keep where the fittings stand, when it is due."""
    if state.keeper is None or not state.keeper.due():
        return
    tensors: dict[str, Tensor] = {}
    forms: list[list[Any]] = [[] for _ in queues]
    for number, fitting in enumerate(fittings):
        tensors |= {f"part/{number}/{name}": t for name, t in fitting.tensors().items()}
    for number, queue in enumerate(queues):
        for place, flow in enumerate(queue):
            form, found = flattened(flow)
            forms[number].append(form)
            tensors |= {f"queue/{number}/{place}/{name}": t for name, t in found.items()}
    counters = {"parts": [fitting.counters() for fitting in fittings], "queues": forms}
    state.keeper.write(state, {"counters": counters, "tensors": tensors})


def _restore(
    fittings: Sequence[Fitting], state: State, size: int | None = None
) -> list[deque[Flow]]:
    """Continue from what ``_keep`` has written, if anything; return the queues that it has."""
    training, state.training = state.training, {}
    if not training:
        return []
    counters, tensors = training["counters"], training["tensors"]
    for number, fitting in enumerate(fittings):
        fitting.restore(counters["parts"][number], _below(f"part/{number}/", tensors))
    return [
        deque(
            (
                restored(form, _below(f"queue/{number}/{place}/", tensors)).to(state.device)
                for place, form in enumerate(forms)
            ),
            maxlen=size,
        )
        for number, forms in enumerate(counters["queues"])
    ]


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
