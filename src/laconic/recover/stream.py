"""What flows from part to part: features of the teacher and the student, and where they wait."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from laconic.errors import ModelError, RunError
from laconic.step import derive, generator_of
from laconic.tasks.split import map_tensors

if TYPE_CHECKING:
    from laconic.tasks import Split

__all__ = ["Data", "Flow", "Source", "Stored", "flattened", "restored"]


@dataclass(frozen=True)
class Flow:
    """What enters a part, for one batch of examples.

    Attributes:
        teacher: the feature in the teacher [batch, ...]; before the first part, the batch itself.
        student: the same in the student.
        beside: what the blocks are called with besides; see Answer.
        answers: what the teacher's part makes of its own, block by block, where that is known.
    """

    teacher: Any
    student: Any
    beside: Mapping[str, Any]
    answers: Sequence[Tensor] = ()

    def to(self, device: str) -> Flow:
        """Return the flow with every tensor on a device."""
        return Flow(*map_tensors(lambda each: each.to(device), self._parts()))

    @property
    def nbytes(self) -> int:
        """Return the bytes that its numbers take."""
        return sum(tensor.nbytes for tensor in flattened(self)[1].values())

    def _parts(self) -> tuple[Any, ...]:
        return (self.teacher, self.student, self.beside, [*self.answers])


def flattened(flow: Flow) -> tuple[Any, dict[str, Tensor]]:
    """Return the form of a flow, JSON-able, and its tensors by name; each tensor once.

    Raises:
        ModelError: blocks are called with something that is neither a tensor nor a plain value.

    >>> form, tensors = flattened(Flow(torch.ones(1), torch.zeros(1), {"args": [None]}))
    >>> form, sorted(tensors)
    ([{'tensor': '0'}, {'tensor': '1'}, {'args': [None]}, []], ['0', '1'])
    """
    found: dict[int, tuple[str, Tensor]] = {}

    def name(tensor: Tensor) -> Any:
        return {"tensor": found.setdefault(id(tensor), (str(len(found)), tensor))[0]}

    form = list(map_tensors(name, flow._parts()))
    try:
        json.dumps(form)
    except TypeError as error:
        raise ModelError(
            f"reconstruct: the blocks are called with something that cannot be sent on ({error}); "
            "write parts: layer"
        ) from None
    return form, dict(found.values())


def restored(form: Any, tensors: Mapping[str, Tensor]) -> Flow:
    """Return the flow of which ``flattened`` returned these, in memory of its own.

    Where numbers lie in a file decides how a processor sums them, and so the last bit.

    >>> restored([{"tensor": "0"}, {"tensor": "0"}, {}, []], {"0": torch.ones(1)}).student
    tensor([1.])
    """

    def fill(value: Any) -> Any:
        if isinstance(value, Mapping):
            if value.keys() == {"tensor"}:
                return tensors[value["tensor"]].clone()
            return {key: fill(each) for key, each in value.items()}
        return [fill(each) for each in value] if isinstance(value, list) else value

    return Flow(*(fill(each) for each in form))


class Source(Protocol):
    """Where a part's batches come from."""

    def __len__(self) -> int:
        """Return how many batches there are."""

    def flows(self, seed: int, start: int) -> Iterator[Flow]:
        """Yield batches without end, every pass in an order of its own, from the start-th on."""

    def each(self) -> Iterator[Flow]:
        """Yield every batch once, the same ones in the same order every time."""

    def close(self) -> None:
        """Forget what is kept."""


class Data:
    """The examples themselves, not augmented: what the first part sees.

    Args:
        split: the examples.
        size: of a batch.
        limit: the most batches that are sent on to the second part.
        seed: of the order in which they are.
        device: where they live.
    """

    def __init__(self, split: Split, size: int, *, limit: int, seed: int, device: str) -> None:
        self.split, self.size, self.limit = split.plain(), size, limit
        self.seed, self.device = seed, device

    def __len__(self) -> int:
        return min(self.limit, self.split.batch_count(self.size))

    def flows(self, seed: int, start: int = 0) -> Iterator[Flow]:
        """Yield batches without end; see Source."""
        passed, first = divmod(start, self.split.batch_count(self.size))
        for epoch in itertools.count(passed):
            for batch in self.split.batches(
                self.size, seed=seed, epoch=epoch, start=first, device=self.device
            ):
                yield Flow(batch, batch, {})
            first = 0

    def each(self) -> Iterator[Flow]:
        """Yield every batch once, or as many as are needed; see Source."""
        return itertools.islice(self.flows(derive(self.seed, "each")), len(self))

    def close(self) -> None:
        """Forget nothing: nothing is kept."""


class Stored:
    """Flows in files, memory-mapped when they are asked for.

    Args:
        folder: that shall hold them; it is made.
        flows: what they are.
        device: where they shall live when they are read.

    Raises:
        RunError: the disk does not take them.
    """

    def __init__(self, folder: Path, flows: Iterable[Flow], device: str) -> None:
        self.folder, self.device, self.count = folder, device, 0
        for flow in flows:
            self._write(flow)

    def __len__(self) -> int:
        return self.count

    def flows(self, seed: int, start: int = 0) -> Iterator[Flow]:
        """Yield batches without end; see Source."""
        passed, first = divmod(start, len(self))
        for epoch in itertools.count(passed):
            drawn = torch.randperm(len(self), generator=generator_of(seed, "order", epoch))
            order: list[int] = drawn.tolist()
            yield from (self._read(index) for index in order[first:])
            first = 0

    def each(self) -> Iterator[Flow]:
        """Yield every batch once; see Source."""
        return (self._read(index) for index in range(len(self)))

    def close(self) -> None:
        """Delete the files."""
        shutil.rmtree(self.folder)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index}.safetensors"

    def _write(self, flow: Flow) -> None:
        form, tensors = flattened(flow)
        # Copies: a file takes no two tensors that share their memory.
        plain = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            self.folder.mkdir(exist_ok=True)
            save_file(plain, self._path(self.count), metadata={"form": json.dumps(form)})
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"reconstruct: the features of batch {self.count + 1} cannot be kept in "
                f"{self.folder} ({error}); make room, take fewer examples with task.few, or give a "
                "run directory on a larger disk (TMPDIR names the place where there is none)"
            ) from error
        self.count += 1

    def _read(self, index: int) -> Flow:
        with safe_open(self._path(index), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            form = json.loads(file.metadata()["form"])
        return restored(form, tensors).to(self.device)
