"""Parts on several processes of torch.distributed, each fed by the process before (MREM-P)."""

from __future__ import annotations

import itertools
import json
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from laconic import ranks
from laconic.errors import RecipeError
from laconic.names import below, module_of
from laconic.recover.fitting import Fitting, fittings_of, gradient_of, parts_of
from laconic.recover.modulewise import Turns
from laconic.recover.parked import parked
from laconic.recover.parts import Part, modules_of, own_blocks
from laconic.recover.stream import Flow, flattened, restored
from laconic.step import State
from laconic.tasks.task import evaluation, needed

if TYPE_CHECKING:
    from laconic.recover.reconstruct import Reconstruct

__all__ = ["Inbox", "Outbox", "balanced", "check_ranks", "fit_on_ranks"]

UNDER_WAY = 2  # batches that wait to be sent; of more, the oldest are forgotten
REPEATS = 3  # times that a block is timed; the shortest counts


def balanced(costs: Sequence[float], count: int) -> list[int]:
    """Return where to cut a row so that the largest sum of a piece is the smallest.

    Args:
        costs: of every item of the row.
        count: of pieces, each of at least an item.

    Returns:
        0, the cuts, and the length of the row.

    >>> balanced([3.0, 1.0, 1.0, 1.0], 2)
    [0, 1, 4]
    """
    sums = [0.0, *itertools.accumulate(costs)]
    ends = range(1, len(sums))
    best: dict[int, tuple[float, list[int]]] = {end: (sums[end], [0, end]) for end in ends}
    for pieces in range(2, count + 1):
        best = {
            end: min(
                (max(best[cut][0], sums[end] - sums[cut]), [*best[cut][1], end])
                for cut in range(pieces - 1, end)
            )
            for end in ends[pieces - 1 :]
        }
    return best[len(costs)][1]


def fit_on_ranks(step: Reconstruct, state: State, size: int) -> None:
    """Fit all parts at once, consecutive ones on each of the processes that torchrun started.

    Features go from process to process while all train: nobody waits, so what a part draws
    depends on who was faster, and the numbers are not the same every time. While they train, a
    process holds the weights of its own parts alone; in the end all hold the same network.

    Args:
        step: what is asked.
        state: the same on all processes.
        size: of a queue, in batches.

    Raises:
        RecipeError: there are more processes than parts.
        RunError: another process has ended; queues do not fit into memory, or weights onto the
            disk.
    """
    kept, tensors = ({}, {}) if state.keeper is None else state.keeper.read_part(state)
    plan = _plan(step, state, kept)
    fittings = fittings_of(step, state, [Part(*pair) for pair in itertools.pairwise(plan["cuts"])])
    shares = [fittings[slice(*pair)] for pair in itertools.pairwise(plan["shares"])]
    turns = Turns(fittings, shares[ranks.rank()], size)
    if kept.get("plan") == plan:
        turns.restore(kept, tensors)
        _take_over(state, tensors)
    with state.scratch() as folder, parked(_held(turns.own), folder):
        _run(turns, plan)
    for source, share in enumerate(shares):
        _exchange(share, state, source)
    for fitting in fittings:
        fitting.finish()


def _held(own: Sequence[Fitting]) -> dict[nn.Module, set[str]]:
    """Return both networks, each with the modules that some parts run through."""
    first, task = own[0], own[0].task
    batch = task.example_batch(2).to(first.state.device)
    taught = [modules_of(each.part, first.teacher, task, batch) for each in own]
    learned = [each.modules for each in own]
    return {first.teacher: set().union(*taught), first.state.model: set().union(*learned)}


def _plan(step: Reconstruct, state: State, kept: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return where the first process cuts blocks into parts, and parts into shares."""
    plan = kept.get("plan")
    if plan is None and ranks.leads():
        parts, seconds = parts_of(step, state.model), _seconds(step, state)
        if len(parts) < ranks.count():
            plan = {"cuts": [len(parts)], "shares": []}
        else:
            cuts = [0, *(part.stop for part in parts)]
            cuts = balanced(seconds, len(parts)) if isinstance(step.parts, int) else cuts
            costs = [sum(seconds[slice(*pair)]) for pair in itertools.pairwise(cuts)]
            plan = {"cuts": cuts, "shares": balanced(costs, ranks.count())}
    told: dict[str, list[int]] = json.loads(ranks.tell(json.dumps(plan).encode(), 0))
    if not told["shares"]:
        check_ranks(told["cuts"][0])
    return told


def check_ranks(parts: int) -> None:
    """Refuse to share parts among more processes.

    Raises:
        RecipeError: there are more processes than parts.

    >>> check_ranks(1)
    """
    if ranks.count() > parts:
        raise RecipeError(
            f"reconstruct: there are {ranks.count()} processes and {parts} parts; start at most "
            f"{parts} (torchrun --nproc-per-node), or ask for more parts"
        )


def _seconds(step: Reconstruct, state: State) -> list[float]:
    """Return how long a forward takes in every block; in the first, with all before it."""
    task = needed(state.task, "reconstruct needs examples")
    network = state.model.to(state.device)
    fed: Any = task.example_batch(gradient_of(step.solve).batch).to(state.device)
    beside: Mapping[str, Any] = {}
    found = []
    with evaluation(network):
        for place in range(len(own_blocks(network))):
            part, times = Part(place, place + 1), []
            for _ in range(REPEATS):
                began = time.perf_counter()
                answer = part.answer(network, task, fed, beside)
                answer.outputs[-1].sum().item()  # waits for a GPU
                times.append(time.perf_counter() - began)
            fed, beside = answer.outputs[-1], answer.beside
            found.append(min(times))
    return found


def _run(turns: Turns, plan: Mapping[str, list[int]]) -> None:
    """Take all turns of this process, joined to its neighbours."""
    place, last, state = ranks.rank(), ranks.count() - 1, turns.state
    ranks.wait()  # one that has ended would be waited for, and not noticed, in new groups
    # All make all groups, in the same order; each belongs to one sender and one receiver.
    groups = [dist.new_group([each, each + 1], ranks.PATIENCE, "gloo") for each in range(last)]
    inbox = outbox = None
    if place:
        queue = turns.queues[turns.own[0].number[0]]
        inbox = Inbox(queue, place - 1, groups[place - 1], state.device)
    if place < last:
        outbox = Outbox(place + 1, groups[place])
    ends = [end for end in (inbox, outbox) if end is not None]
    for sent in turns.each():
        for end in ends:
            end.check()
        if outbox is not None:
            outbox.push(sent)
        if state.keeper is not None and state.keeper.due():
            payload = turns.payload()
            tensors = payload["tensors"] | _of_parts(turns.own)
            state.keeper.write_part(state, payload["counters"] | {"plan": plan}, tensors)
    for end in ends:
        end.close()


class _End(ABC):
    """An end of the connection to a neighbour, at work in a thread of its own."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self._guarded, daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raise what went wrong in the thread."""
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Wait until all is through."""
        self.thread.join()
        self.check()

    @abstractmethod
    def _work(self) -> None:
        """Pass on flow after flow until the last."""

    def _guarded(self) -> None:
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - the main thread raises it
            self.failure = error


class Outbox(_End):
    """Sends flows to the next process; the newest, where it is slow.

    Args:
        to: the rank of that process.
        group: of the two.
    """

    def __init__(self, to: int, group: Any) -> None:
        self.to, self.group = to, group
        self.waiting: deque[Flow | None] = deque(maxlen=UNDER_WAY)
        self.news = threading.Condition()
        super().__init__()

    def push(self, flow: Flow | None) -> None:
        """Have a flow sent, sooner or later or never; None: it was the last."""
        with self.news:
            self.waiting.append(flow)
            self.news.notify()

    def close(self) -> None:
        """Wait until all is sent."""
        self.push(None)
        super().close()

    def _next(self) -> Flow | None:
        with self.news:
            self.news.wait_for(lambda: bool(self.waiting))
            return self.waiting.popleft()

    def _work(self) -> None:
        while (flow := self._next()) is not None:
            self._send(*flattened(flow))
        with ranks.lost(f"reconstruct: rank {self.to}"):
            ranks.send(b"null", self.to, self.group)

    def _send(self, form: Any, tensors: Mapping[str, Tensor]) -> None:
        kinds = {name: (each.shape, _kind(each)) for name, each in tensors.items()}
        plain = [each.detach().cpu() for each in tensors.values()]
        with ranks.lost(f"reconstruct: rank {self.to}"):
            ranks.send(json.dumps([form, kinds]).encode(), self.to, self.group)
            for each in plain:
                ranks.send_tensor(each, self.to, self.group)


class Inbox(_End):
    """Fills a queue with what the process before sends.

    Args:
        queue: forgets its oldest.
        source: the rank of that process.
        group: of the two.
        device: where flows shall live.
    """

    def __init__(self, queue: deque[Flow], source: int, group: Any, device: str) -> None:
        self.queue, self.source, self.group, self.device = queue, source, group, device
        super().__init__()

    def _work(self) -> None:
        while (flow := self._received()) is not None:
            self.queue.append(flow.to(self.device))

    def _received(self) -> Flow | None:
        with ranks.lost(f"reconstruct: rank {self.source}"):
            head = json.loads(ranks.receive(self.source, self.group))
            if head is None:
                return None
            form, kinds = head
            tensors = {
                name: ranks.receive_tensor(shape, getattr(torch, kind), self.source, self.group)
                for name, (shape, kind) in kinds.items()
            }
        return restored(form, tensors)


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# ------------------------------------------------------------------ what each has made, for all


def _of_parts(fittings: Sequence[Fitting]) -> dict[str, Tensor]:
    """Return the parameters and buffers that parts hold, as a state dict names them."""
    names = {name for fitting in fittings for name in fitting.modules}
    state = fittings[0].state.model.state_dict()
    return {f"model/{name}": t for name, t in state.items() if module_of(name) in names}


def _take_over(state: State, tensors: Mapping[str, Tensor]) -> None:
    """Load what ``_of_parts`` returned."""
    state.model.load_state_dict(below("model/", tensors), strict=False)


def _exchange(share: Sequence[Fitting], state: State, source: int) -> None:
    """Let all processes have what one has made of its parts."""
    mine = ranks.rank() == source
    curves = {fitting.label: state.curves.get(fitting.label, []) for fitting in share}
    facts = {"counters": [fitting.counters() for fitting in share], "curves": curves}
    told = json.loads(ranks.tell(json.dumps(facts).encode() if mine else b"", source))
    tensors = load(ranks.tell(_packed(_of_parts(share)) if mine else b"", source))
    if mine:
        return
    _take_over(state, tensors)
    state.curves.update(told["curves"])
    for fitting, counters in zip(share, told["counters"], strict=True):
        fitting.stand(counters)


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    # Copies: a file takes no two tensors that share their memory.
    return save({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()})
