"""Ranks: the processes of one run, where torchrun has started several."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from laconic.errors import RunError

__all__ = [
    "count",
    "gpu",
    "joined",
    "leads",
    "lost",
    "prints",
    "rank",
    "receive",
    "receive_tensor",
    "send",
    "send_tensor",
    "tell",
    "wait",
]

# A process may wait for slower ones as long as they take: that one has ended is noticed at once, by
# its closed connections, and torchrun watches the machines.
PATIENCE = datetime.timedelta(days=7)


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun has started, for the duration of a with block.

    They talk over gloo, on the host, whatever they compute on. Without torchrun nothing happens.

    Raises:
        RunError: the caller has joined them by what carries no numbers of the host.

    >>> with joined():
    ...     rank(), count(), leads()
    (0, 1, True)
    """
    if _together() and "cpu:" not in dist.get_backend_config():
        raise RunError(
            f"the processes are joined by {dist.get_backend()} alone, which carries no numbers of "
            "the host; call init_process_group('cpu:gloo,cuda:nccl'), or leave it to laconic"
        )
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Return the place of this process among them, from 0.

    >>> rank()
    0
    """
    return dist.get_rank() if _together() else 0


def count() -> int:
    """Return how many processes there are.

    >>> count()
    1
    """
    return dist.get_world_size() if _together() else 1


def leads() -> bool:
    """Return whether this is the process that writes.

    >>> leads()
    True
    """
    return rank() == 0


def prints() -> bool:
    """Return whether this process tells people what happens: one on a machine does.

    >>> prints()
    True
    """
    launched = dist.is_available() and dist.is_torchelastic_launched()
    return not launched or dist.get_node_local_rank(fallback_rank=0) == 0


def gpu() -> str:
    """Return the GPU of this process; those of one machine divide its GPUs among them.

    >>> gpu()
    'cuda'
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return "cuda"
    return f"cuda:{dist.get_node_local_rank(fallback_rank=0) % torch.cuda.device_count()}"


def wait() -> None:
    """Wait until every process has come here.

    Raises:
        RunError: one of them has ended.

    >>> wait()
    """
    if count() > 1:
        with lost("another rank"):
            dist.barrier()


def tell(message: bytes, source: int) -> bytes:
    """Return to every process what one of them has to say.

    Args:
        message: of that one; the others' does not matter.
        source: its rank.

    Raises:
        RunError: one of them has ended.

    >>> tell(b"said", 0)
    b'said'
    """
    if count() == 1:
        return message
    size = torch.tensor([len(message)])
    with lost("another rank"):
        dist.broadcast(size, source)
        content = _numbers(message if rank() == source else bytes(int(size)))
        dist.broadcast(content, source)
    return content.numpy().tobytes()


def send(message: bytes, to: int, group: dist.ProcessGroup) -> None:
    """Send something to another process and wait until it has it.

    Args:
        message: at least a byte.
        to: its rank.
        group: of the two.

    >>> send(b"some", 1, dist.new_group([0, 1]))  # doctest: +SKIP
    """
    dist.send(torch.tensor([len(message)]), to, group=group)
    dist.send(_numbers(message), to, group=group)


def receive(source: int, group: dist.ProcessGroup) -> bytes:
    """Return what another process sends.

    Args:
        source: its rank.
        group: of the two.

    >>> receive(0, dist.new_group([0, 1]))  # doctest: +SKIP
    b'some'
    """
    size = torch.zeros(1, dtype=torch.int64)
    dist.recv(size, source, group=group)
    content = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(content, source, group=group)
    return content.numpy().tobytes()


def send_tensor(tensor: torch.Tensor, to: int, group: dist.ProcessGroup) -> None:
    """Send the numbers of a tensor as they are, and wait until they are there.

    Args:
        tensor: with at least a number, on the host; it must not change before.
        to: the rank of that process.
        group: of the two.

    >>> send_tensor(torch.ones(2), 1, dist.new_group([0, 1]))  # doctest: +SKIP
    """
    numbers = tensor.contiguous().reshape(-1)
    dist.send(numbers.view(torch.uint8), to, group=group)


def receive_tensor(
    shape: Sequence[int], dtype: torch.dtype, source: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """Return a tensor that another process sends, on the host.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        source: the rank of that process.
        group: of the two.

    >>> receive_tensor([2], torch.float32, 0, dist.new_group([0, 1]))  # doctest: +SKIP
    tensor([1., 1.])
    """
    numbers = torch.empty(math.prod(shape), dtype=dtype)
    dist.recv(numbers.view(torch.uint8), source, group=group)
    return numbers.reshape(tuple(shape))


@contextmanager
def lost(who: str) -> Iterator[None]:
    """Say what to do where another process cannot be reached any more.

    Args:
        who: that is.

    Raises:
        RunError: torch says that a connection is closed.

    >>> with lost("rank 1"):
    ...     pass
    """
    try:
        yield
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise RunError(
            f"{who} has ended or cannot be reached ({first}); its own message says why. Start "
            "all ranks again, and resume the run"
        ) from error


def _numbers(message: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
