"""Parts of a network learn one after the other, or all at once (Bai et al. 2022, MREM)."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laconic import ranks
from laconic.errors import RunError
from laconic.machine import free_memory
from laconic.names import below
from laconic.progress import progress
from laconic.recover.fitting import Fitting
from laconic.recover.stream import Data, Flow, Source, Stored, flattened, restored
from laconic.step import State, derive
from laconic.tasks.task import evaluation

__all__ = ["Turns", "data_of", "fit_all_at_once", "fit_in_order"]


def data_of(fitting: Fitting) -> Data:
    """Return what enters the first part."""
    state, solve = fitting.state, fitting.solve
    return Data(
        fitting.task.train, solve.batch, limit=solve.updates, seed=state.seed, device=state.device
    )


def fit_in_order(fittings: Sequence[Fitting], state: State) -> None:
    """Fit one part after the other, each fed by those that are done (MREM-S).

    What leaves the parts that are done is computed once and kept on disk until they are all done,
    and so is what the teacher's next part makes of it.

    Args:
        fittings: all parts.
        state: of the run; an interrupted part goes on where it stopped.

    Raises:
        RunError: a loss is not finite; the disk is full.
    """
    source: Source = data_of(fittings[0])
    passed = 0
    with state.scratch() as folder:
        for index in state.rounds(len(fittings)):
            for number in range(passed, index):
                pair = (fittings[number], fittings[number + 1])
                source = _passed(*pair, source, folder / str(number))
            passed = index
            _fit(fittings[index], source, state)


def _passed(fitting: Fitting, following: Fitting, source: Source, folder: Path) -> Stored:
    """Return what leaves a part that is done, kept in a folder; forget what entered it."""
    label = f"reconstruct: what leaves part {fitting.number[0]}"
    batches = progress(source.each(), label, len(source))
    flows = (following.answered(fitting.passed(flow)) for flow in batches)
    with evaluation(fitting.state.model):  # so that weights are decoded once for all batches
        kept = Stored(folder, flows, fitting.state.device)
    source.close()
    return kept


def _fit(fitting: Fitting, source: Source, state: State) -> None:
    """Take all updates of a part that are left."""
    training, state.training = state.training, {}
    if training:
        _restore([fitting], training["counters"], training["tensors"])
    fitting.begin()
    flows = source.flows(derive(state.seed, "flows", fitting.number[0]), fitting.finished)
    for _ in _ticks(fitting):
        fitting.update(next(flows))
        state.checkpoint(lambda: _payload([fitting]))
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
    turns = Turns(fittings, fittings, size)
    training, state.training = state.training, {}
    if training:
        turns.restore(training["counters"], training["tensors"])
    for _ in turns.each():
        state.checkpoint(turns.payload)
    for fitting in fittings:
        fitting.finish()


class Turns:
    """Parts that take an update in turn, and the queues that feed them.

    Args:
        fittings: all parts.
        own: those that take turns here, one after the other.
        size: of a queue, in batches.

    Raises:
        RunError: the queues do not fit into memory.
    """

    def __init__(self, fittings: Sequence[Fitting], own: Sequence[Fitting], size: int) -> None:
        self.own, self.state = own, own[0].state
        self.data = data_of(fittings[0])
        fed = [fitting.number[0] for fitting in own if fitting.part.start]
        before = fittings[: own[-1].number[0] - 1]
        _check_memory(before, fed, size)
        self.queues: dict[int, deque[Flow]] = {number: deque(maxlen=size) for number in fed}
        self._fill(before, size)

    def each(self) -> Iterator[Flow]:
        """Take all turns that are left; yield what the last part sends after each."""
        for fitting in self.own:
            fitting.begin()
        flows = self.data.flows(derive(self.state.seed, "flows", 1), self.own[0].finished)
        for _ in zip(*(_ticks(fitting) for fitting in self.own), strict=True):
            for fitting in self.own:
                number = fitting.number[0]
                flow = self._drawn(fitting) if number in self.queues else next(flows)
                sent = fitting.update(flow)
                if number + 1 in self.queues:
                    self.queues[number + 1].append(sent)
            yield sent

    def payload(self) -> dict[str, Any]:
        """Return all that resumed turns need: counters and named tensors."""
        found = _payload(self.own)
        forms: dict[str, list[Any]] = {}
        for number, queue in self.queues.items():
            for place, flow in enumerate(queue.copy()):
                form, tensors = flattened(flow)
                forms.setdefault(str(number), []).append(form)
                prefix = f"queue/{number}/{place}"
                found["tensors"] |= {f"{prefix}/{name}": t for name, t in tensors.items()}
        found["counters"]["queues"] = forms
        return found

    def restore(self, counters: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from what ``payload`` returned."""
        _restore(self.own, counters, tensors)
        for number, forms in counters["queues"].items():
            for place, form in enumerate(forms):
                kept = below(f"queue/{number}/{place}/", tensors)
                self.queues[int(number)].append(restored(form, kept).to(self.state.device))

    def _fill(self, before: Sequence[Fitting], size: int) -> None:
        """Fill the queues with the teacher's features."""
        for flow in itertools.islice(self.data.flows(derive(self.state.seed, "fill")), size):
            for fitting in before:
                flow = fitting.taught(flow)
                if fitting.number[0] + 1 in self.queues:
                    self.queues[fitting.number[0] + 1].append(flow)

    def _drawn(self, fitting: Fitting) -> Flow:
        """Return the batch that a part draws from its queue for its next update."""
        queue = self.queues[fitting.number[0]]
        generator = self.state.generator("queue", fitting.number[0], fitting.finished)
        return queue[int(torch.randint(len(queue), (), generator=generator))]


def _check_memory(before: Sequence[Fitting], fed: Sequence[int], size: int) -> None:
    """Refuse queues that would not fit into the memory that is free, as if all ranks shared it.

    Args:
        before: all parts but the last.
        fed: the numbers of those that have a queue.
        size: of a queue, in batches.

    Raises:
        RunError: they are larger.
    """
    if not fed:
        return
    device, solve = before[0].state.device, before[0].solve
    batch = before[0].task.example_batch(2).to(device)
    flow, one = Flow(batch, batch, {}), 0
    for fitting in before:
        flow = fitting.passed(flow)
        one += flow.nbytes * (fitting.number[0] + 1 in fed)
    wanted = one * size * solve.batch // len(flow.teacher)
    on_gpu = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else free_memory() // ranks.count()
    if wanted > free:
        fits = max(1, size * free // wanted)
        raise RunError(
            f"reconstruct: {len(fed)} queues of {size} batches take {wanted / 2**20:.0f} MiB, and "
            f"{free / 2**20:.0f} MiB are free; write 'order: {{parallel: {fits}}}', or a smaller "
            "batch"
        )


def _ticks(fitting: Fitting) -> Iterator[int]:
    """Return the updates that are left to a part, for all to see."""
    left = range(fitting.finished, fitting.solve.updates)
    return progress(left, "reconstruct part {} of {}".format(*fitting.number), len(left))


# ------------------------------------------------------------------ checkpoints


def _payload(fittings: Sequence[Fitting]) -> dict[str, Any]:
    """Return what resumed fittings need: counters and named tensors."""
    tensors = {
        f"part/{place}/{name}": tensor
        for place, fitting in enumerate(fittings)
        for name, tensor in fitting.tensors().items()
    }
    return {"counters": {"parts": [each.counters() for each in fittings]}, "tensors": tensors}


def _restore(
    fittings: Sequence[Fitting], counters: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Continue from what ``_payload`` returned."""
    for place, fitting in enumerate(fittings):
        fitting.restore(counters["parts"][place], below(f"part/{place}/", tensors))
