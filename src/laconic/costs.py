"""Costs of a network: multiply-accumulates, bit-operations, latency, memory, plain bytes."""

from __future__ import annotations

import contextlib
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from laconic.ledger import FLOAT_BITS, Layer
from laconic.machine import processor
from laconic.scope import Scope
from laconic.tasks.split import Batch, tensors_in
from laconic.tasks.task import call_model, device_of, evaluation
from laconic.weights.laid import baked, laid_tensors, weights_of

__all__ = [
    "bit_operations",
    "environment",
    "float_bytes",
    "latency",
    "macs",
    "peak_memory",
    "plain",
]

TOTAL = ""
FEWEST_REPEATS = 3

Call = Callable[[nn.Module, Batch], Any]


def plain(model: nn.Module) -> nn.Module:
    """Return the network without laid weights: a baked copy, or itself if it has none.

    >>> network = nn.Linear(2, 2)
    >>> plain(network) is network
    True
    """
    return baked(model) if laid_tensors(model) else model


def macs(model: nn.Module, inputs: Any, *, call: Call = call_model) -> dict[str, int]:
    """Return the multiply-accumulates of one forward, by weight and in total.

    One MAC is one multiplication with its addition, half of the floating-point operations
    torch counts. Only matrix products and convolutions count, dense (zeros included), padding
    too; biases, norms and activation functions do not. A product of two weights counts for the
    first. Products of two activations, as in attention, and those with what a network computes
    from its weights are in the total alone.

    Args:
        model: laid weights count as plain ones; the meta device works too.
        inputs: a Batch or its inputs (tensor, tuple or mapping); the count is for all of them.
        call: (model, batch) -> outputs.

    Returns:
        Dotted name of each matrix or kernel -> MACs; "" -> the total.

    >>> macs(nn.Sequential(nn.Linear(3, 2)), torch.ones(4, 3))
    {'': 24, '0.weight': 24}
    """
    network, batch = plain(model), _batch(inputs)
    counter = _Counter(weights_of(network, Scope("*")))
    with evaluation(network), _countable(), counter:
        call(network, batch)
    return counter.macs


class _Counter(TorchDispatchMode):
    """Adds up the MACs of every operation, on the account of the weight it reads."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owners = _Owners()
        for name, weight in weights.items():
            self.owners.add(weight, name)
        self.macs = {TOTAL: 0} | dict.fromkeys(weights, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, operation = kwargs or {}, func.overloadpacket
        formula = _FORMULAS.get(operation) or flop_registry.get(operation)
        if formula is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is NotImplemented:
                result = func(*args, **kwargs)
            if operation in _COPIES and (name := self.owners.of(args[0])):
                self.owners.add(result, name)
            return result
        result = func(*args, **kwargs)
        amount = formula(*args, **kwargs, out_val=result) // 2
        self.macs[TOTAL] += amount
        owners = (self.owners.of(each) for each in args if isinstance(each, Tensor))
        if first := next(filter(None, owners), None):
            self.macs[first] += amount
        return result


class _Owners:
    """Which weight a tensor is, or is a part of: the bytes of memory that each takes."""

    def __init__(self) -> None:
        self._places: dict[StorageWeakRef, list[tuple[range, str]]] = {}

    def add(self, tensor: Tensor, name: str) -> None:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in steps)
        place = range(_start(tensor), _start(tensor) + (last + 1) * tensor.element_size())
        self._places.setdefault(_storage(tensor), []).append((place, name))

    def of(self, tensor: Tensor) -> str | None:
        within = self._places.get(_storage(tensor), [])
        return next((name for place, name in within if _start(tensor) in place), None)


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _start(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _product_flops(first: Tensor, second: Tensor, *_: Any, **__: Any) -> int:
    """Return the operations of a matrix, or a vector, times a vector."""
    return 2 * first.numel()


def _added_product_flops(_: Tensor, matrix: Tensor, vector: Tensor, **__: Any) -> int:
    return _product_flops(matrix, vector)


def _added_batches_flops(_: Tensor, first: Tensor, second: Tensor, **__: Any) -> int:
    return 2 * first.numel() * second.shape[-1]


def _trilinear_flops(*tensors: Any, out_val: Tensor, **_: Any) -> int:
    """Return those of torch's Bilinear: three factors, each broadcast over its own dimensions."""
    spread = []
    for tensor, places in zip(tensors[:3], tensors[3:6], strict=True):
        for place in places:
            tensor = tensor.unsqueeze(place)
        spread.append(tensor.shape)
    return 2 * int(math.prod(torch.broadcast_shapes(*spread)))


# What torch's own table of operations lacks.
_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mv: _product_flops,
    torch.ops.aten.dot: _product_flops,
    torch.ops.aten.vdot: _product_flops,
    torch.ops.aten.addmv: _added_product_flops,
    torch.ops.aten.addbmm: _added_batches_flops,
    torch.ops.aten._trilinear: _trilinear_flops,
}
# A weight in another dtype, as under autocast, or in another order is that weight still.
_COPIES = {torch.ops.aten._to_copy, torch.ops.aten.clone}


@contextlib.contextmanager
def _countable() -> Iterator[None]:
    """Run a with block without the fused operations that hide their matrix products."""
    fused, onednn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        torch.backends.mkldnn.enabled = onednn


def bit_operations(layers: Sequence[Layer], macs: int, *, operand_bits: int = FLOAT_BITS) -> int:
    """Return the bit-operations of one forward, pruned weights skipped.

    ``sum_l macs_l * (survivors_l / parameters_l) * bits_l * input_bits_l``, and the square of
    ``operand_bits`` for every MAC without a weight (attention). ``macs_l`` is dense; bits are
    those of the stored code, so a codebook of 32 values counts 5 bits.

    Args:
        layers: the weights, with their MACs.
        macs: of the whole forward.
        operand_bits: width of the numbers that attention multiplies.

    >>> bit_operations([], 10)
    10240
    """
    weighted = sum(
        layer.macs * layer.survivors / layer.parameters * layer.bits * layer.input_bits
        for layer in layers
        if layer.macs
    )
    without = macs - sum(layer.macs or 0 for layer in layers)
    return round(weighted + without * operand_bits * operand_bits)


def latency(
    model: nn.Module,
    inputs: Any,
    *,
    repeats: int = 100,
    warm_up: int = 3,
    limit: float = 1.0,
    call: Call = call_model,
) -> float:
    """Return the median time of a forward, in milliseconds.

    Laid weights decode themselves in every forward, which no deployed network does, so a baked
    copy is timed.

    Args:
        model: timed where it is, with the threads torch has.
        inputs: a Batch or its inputs, on the model's device.
        repeats: timed forwards at most.
        warm_up: forwards before the first that counts.
        limit: seconds after which no further forward starts, once 3 have been timed.
        call: (model, batch) -> outputs.

    >>> latency(nn.Linear(2, 2), torch.ones(1, 2)) < 1000
    True
    """
    network, batch = plain(model), _batch(inputs)
    wait = torch.cuda.synchronize if device_of(network).type == "cuda" else _nothing
    times: list[float] = []
    with evaluation(network):
        begin = time.perf_counter()
        for _ in range(warm_up + repeats):
            start = time.perf_counter()
            call(network, batch)
            wait()
            end = time.perf_counter()
            times.append(end - start)
            if end - begin > limit and len(times) >= warm_up + FEWEST_REPEATS:
                break
    return 1000 * statistics.median(times[warm_up:])


def peak_memory(model: nn.Module, inputs: Any, *, call: Call = call_model) -> int:
    """Return the most memory one forward holds at a time, in bytes.

    Parameters, buffers, inputs and every tensor alive between two operations, each storage
    once: exact, and the same on every run. What an operation allocates and frees inside
    itself is not seen, but on CUDA, where torch's allocator is asked.

    Args:
        model: a baked copy is run where weights are laid.
        inputs: a Batch or its inputs, on the model's device.
        call: (model, batch) -> outputs.

    >>> peak_memory(nn.ReLU(), torch.ones(10))
    80
    """
    network, batch = plain(model), _batch(inputs)
    live = _Live()
    live.add([*network.parameters(), *network.buffers()])
    live.add(batch.inputs)
    if device_of(network).type == "cuda":
        return live.peak + _cuda_growth(network, batch, call)
    with evaluation(network), live:
        call(network, batch)
    return live.peak


class _Live(TorchDispatchMode):
    """Follows the storages that are alive after each operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(result)
        return result

    def add(self, tensors: Any) -> None:
        for tensor in tensors_in(tensors):
            storage = tensor.untyped_storage()
            self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        self.sizes = {ref: size for ref, size in self.sizes.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.sizes.values()))


def _cuda_growth(network: nn.Module, batch: Batch, call: Call) -> int:
    device = device_of(network)
    with evaluation(network):
        call(network, batch)  # the libraries' workspaces are allocated once and stay
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call(network, batch)
        torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def float_bytes(model: nn.Module) -> int:
    """Return the size of the plain float32 safetensors file of a network, in bytes.

    The file is written and asked for its size. Floating-point tensors are stored as float32,
    others as they are, a shared one once: what a checkpoint without any compression takes.

    >>> float_bytes(nn.Linear(100, 100)) > 4 * 10_100
    True
    """
    from safetensors.torch import save_file

    stored: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in plain(model).state_dict(keep_vars=True).items():
        stored.setdefault(id(tensor), (name, tensor))
    tensors = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().clone()
        for name, tensor in stored.values()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        return path.stat().st_size


def environment() -> dict[str, Any]:
    """Return what the figures of a run depend on besides its recipe, JSON-able.

    >>> environment()["threads"] == torch.get_num_threads()
    True
    """
    import numpy as np

    from laconic import __version__

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "laconic": __version__,
        "threads": torch.get_num_threads(),
        "cpu": processor(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "precision": {
            "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
            "matmul": torch.get_float32_matmul_precision(),
            "tf32_convolutions": cuda and torch.backends.cudnn.allow_tf32,
            "onednn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
    }


def _batch(inputs: Any) -> Batch:
    return inputs if isinstance(inputs, Batch) else Batch(inputs)


def _nothing() -> None:
    """Wait for nothing: operations on the CPU have ended when they return."""
