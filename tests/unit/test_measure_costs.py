"""Costs counted by hand: multiplications, bit operations, latency and peak memory."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from helpers.measured import FLOAT, shared, small, small_task, three_steps
from laconic import costs
from laconic.errors import ArtifactError, ModelError, TaskError
from laconic.ledger import Layer, Measurement
from laconic.measure import bit_operations, latency, macs, measure, peak_memory
from laconic.models import digits_cnn
from laconic.run import compress
from laconic.scope import Scope
from laconic.tasks import Task
from laconic.tasks.split import Batch
from laconic.weights import Quantize
from laconic.weights.codebook import KMeans
from laconic.weights.laid import Laid, laid_tensors, lay
from laconic.weights.representation import Float


@pytest.fixture
def history() -> list[Measurement]:
    return three_steps()


# --- operations -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "shape", "count"),
    [
        (nn.Linear(10, 20), (2, 10), 2 * 10 * 20),
        (nn.Linear(10, 20), (2, 7, 10), 2 * 7 * 10 * 20),
        (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 6, 6), 3 * 8 * 9 * 36),
        (nn.Conv2d(4, 8, 3, stride=2, groups=4), (2, 4, 7, 7), 2 * 8 * 9 * 9),
        (nn.Conv1d(3, 5, 2), (1, 3, 6), 3 * 5 * 2 * 5),
        (nn.Embedding(9, 4), (1,), 0),
    ],
)
def test_macs_by_hand(module: nn.Module, shape: tuple[int, ...], count: int) -> None:
    inputs = torch.zeros(shape, dtype=torch.long if count == 0 else torch.float32)
    assert macs(module, inputs) == {"": count, "weight": count}


def test_macs_are_those_of_the_plain_network() -> None:
    model, inputs = small(), torch.ones(1, 10)
    expected = {"": 300, "0.weight": 200, "2.weight": 100}
    assert macs(model, inputs) == macs(shared(model), inputs) == expected
    assert macs(copy.deepcopy(model).to("meta"), inputs.to("meta")) == expected


def test_macs_of_attention_have_no_weight() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = macs(layer, torch.zeros(1, 5, 8))
    assert found["self_attn.in_proj_weight"] == 5 * 8 * 24
    assert found["self_attn.out_proj.weight"] == 5 * 8 * 8
    assert found["linear1.weight"] == found["linear2.weight"] == 5 * 8 * 16
    assert found.pop("") - sum(found.values()) == 2 * 5 * 5 * 8


def test_macs_see_into_recurrent_layers() -> None:
    found = macs(nn.LSTM(4, 6, batch_first=True), torch.zeros(2, 3, 4))
    assert found == {"": 6 * 24 * 10, "weight_ih_l0": 6 * 24 * 4, "weight_hh_l0": 6 * 24 * 6}


def test_laid_recurrent_layers_are_counted_once_they_were_moved() -> None:
    """torch keeps the decoded weights of a layer that was moved, with their graph."""
    layer, inputs = nn.LSTM(4, 6, batch_first=True), torch.zeros(2, 3, 4)
    expected = macs(layer, inputs)
    lay(layer, "weight_hh_l0", Float())
    assert macs(layer.to("cpu"), inputs) == expected


class Using(nn.Module):
    """A network that is one operation on its inputs [2, 4] and its weight [3, 4]."""

    def __init__(self, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.operation = nn.Parameter(torch.randn(3, 4)), operation

    def forward(self, inputs: Tensor) -> Tensor:
        return self.operation(inputs, self.weight)


def under_autocast(inputs: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return functional.linear(inputs, weight)


@pytest.mark.parametrize(
    ("operation", "total", "count"),
    [
        (lambda x, w: w @ x[0], 12, 12),
        (lambda x, w: torch.addmv(torch.zeros(3), w, x[0]), 12, 12),
        (lambda x, w: torch.dot(x[0], w[0]), 4, 4),
        (lambda x, w: torch.vdot(x[0], w[0]), 4, 4),
        (lambda x, w: torch.addbmm(torch.zeros(2, 3), x[None], w.t()[None]), 24, 24),
        (lambda x, w: torch.einsum("bi,oi->bo", x, w), 24, 24),
        (lambda x, w: x @ w.t().contiguous(), 24, 24),
        (lambda x, w: functional.linear(x, w[1:]), 16, 16),
        (lambda x, w: functional.linear(x, w.t() @ w), 48 + 32, 48),
        (lambda x, w: functional.linear(x, 2 * w), 24, 0),
        (under_autocast, 24, 24),
    ],
)
def test_every_product_counts_for_the_weight_it_reads(
    operation: Callable[[Tensor, Tensor], Tensor], total: int, count: int
) -> None:
    assert macs(Using(operation), torch.ones(2, 4)) == {"": total, "weight": count}


def test_macs_of_a_product_of_two_inputs_and_a_weight() -> None:
    found = macs(nn.Bilinear(3, 4, 5), (torch.ones(2, 3), torch.ones(2, 4)))
    assert found == {"": 2 * 3 * 4 * 5, "weight": 2 * 3 * 4 * 5}


def test_weights_in_one_piece_of_memory_count_apart() -> None:
    model = small()
    torch.nn.utils.vector_to_parameters(
        torch.cat([each.detach().flatten() for each in model.parameters()]), model.parameters()
    )
    assert macs(model, torch.ones(1, 10)) == {"": 300, "0.weight": 200, "2.weight": 100}


def test_a_product_of_two_weights_counts_once() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(5, 5)) for _ in range(2))

        def forward(self, inputs: Tensor) -> Tensor:
            return functional.linear(inputs, self.first @ self.second)

    assert macs(Product(), torch.ones(1, 5)) == {"": 150, "first": 125, "second": 0}


def test_counting_leaves_torch_as_it_was() -> None:
    fused, onednn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    with pytest.raises(RuntimeError):
        macs(small(), torch.ones(1, 11))
    assert torch.backends.mha.get_fastpath_enabled() == fused
    assert torch.backends.mkldnn.enabled == onednn


class Named(nn.Linear):
    """Wants its inputs by name."""

    def forward(self, *, first: Tensor, second: Tensor) -> Tensor:
        return super().forward(first + second)


def test_named_inputs_and_a_call_of_the_users_own() -> None:
    inputs = {"first": torch.ones(1, 2), "second": torch.ones(1, 2)}
    assert macs(Named(2, 3), inputs)[""] == 6
    assert peak_memory(Named(2, 3), inputs) == (9 + 3 * 2 + 3) * FLOAT
    assert latency(Named(2, 3), inputs, repeats=1) > 0

    def second(network: nn.Module, batch: Batch) -> Tensor:
        return network(batch.inputs[0].flip(1))

    found = measure(small(), small_task(call=second), latency=False)
    assert found.macs == 300


def layer_of(**fields: Any) -> Layer:
    given = {"name": "w", "shape": (4, 8), "parameters": 32, "survivors": 32, "nonzero": 32}
    given |= {"bits": 32.0, "representation": "float", "macs": 320, "histogram": {}}
    given |= dict.fromkeys(("code_bytes", "index_bytes", "table_bytes", "dense_bytes"), 0)
    return Layer(**(given | fields))


def test_bit_operations_by_hand() -> None:
    assert bit_operations([layer_of()], 320) == 320 * 32 * 32
    half_of_it = layer_of(survivors=16, bits=2.0)
    assert bit_operations([layer_of(survivors=16, bits=2.0, input_bits=8)], 320) == 320 * 8
    attention = 100
    assert bit_operations([half_of_it], 320 + attention) == 320 * 0.5 * 2 * 32 + 100 * 1024
    assert bit_operations([half_of_it], 420, operand_bits=4) == 320 * 0.5 * 2 * 32 + 100 * 16
    assert bit_operations([layer_of(macs=None), layer_of(macs=0)], 0) == 0


def test_bit_operations_of_a_measurement(history: list[Measurement]) -> None:
    whole, prune, quantize = history
    assert whole.macs == prune.macs == quantize.macs == 300
    assert whole.bit_operations == 300 * 1024
    assert prune.bit_operations == (100 + 100) * 1024
    assert quantize.bit_operations == 100 * 3 * 32 + 100 * 1024


# --- time and memory ------------------------------------------------------------------


def test_latency_never_runs_laid_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    forward = Laid.forward
    monkeypatch.setattr(
        Laid, "forward", lambda self, weight: decoded.append(1) or forward(self, weight)
    )
    model, inputs = shared(small()), torch.ones(1, 10)
    decoded.clear()
    costs.plain(model)
    baking = len(decoded)
    for measured in (latency, macs, peak_memory):
        decoded.clear()
        measured(model, inputs)
        assert len(decoded) == baking


class Slow(nn.Module):
    """Takes a known time, longer at first."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        time.sleep(0.03 if self.calls <= 4 else 0.002)
        return x


def test_latency_is_the_median_after_the_warm_up() -> None:
    slow = Slow()
    assert 2 <= latency(slow, torch.ones(1), repeats=3, warm_up=4) < 25
    assert slow.calls == 7


def test_latency_stops_when_its_time_is_over() -> None:
    slow = Slow()
    latency(slow, torch.ones(1), repeats=10_000, warm_up=0, limit=0.01)
    assert slow.calls == 3


# 325 parameters; two inputs of 10, activations of 20 and 5 numbers each.
RESIDENT = (200 + 20 + 100 + 5) * FLOAT + 2 * 10 * FLOAT
WIDE, NARROW = 2 * 20 * FLOAT, 2 * 5 * FLOAT


def test_peak_memory_by_hand() -> None:
    inputs = torch.ones(2, 10)
    assert peak_memory(small(), inputs) == RESIDENT + 2 * WIDE
    in_place = nn.Sequential(nn.Linear(10, 20), nn.ReLU(inplace=True), nn.Linear(20, 5))
    assert peak_memory(in_place, inputs) == RESIDENT + WIDE + NARROW
    views = nn.Sequential(
        nn.Linear(10, 20), nn.Unflatten(1, (4, 5)), nn.Flatten(), nn.Linear(20, 5)
    )
    assert peak_memory(views, inputs) == RESIDENT + WIDE + NARROW


class Kept(nn.Module):
    """Holds its input until the end, as a residual connection does."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = x + 1
        hidden = hidden + 1
        return hidden + x


def test_peak_memory_counts_what_is_alive() -> None:
    assert peak_memory(nn.Sequential(nn.Identity(), Kept()), torch.ones(10)) == 3 * 40
    assert peak_memory(nn.Sequential(nn.ReLU(), Kept()), torch.ones(10)) == 4 * 40


def test_peak_memory_counts_buffers_and_shared_parameters_once() -> None:
    norm = nn.BatchNorm1d(10)
    counter = 8
    assert peak_memory(norm, torch.ones(3, 10)) == 40 * FLOAT + counter + 2 * 30 * FLOAT
    tied = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    tied[1].weight = tied[0].weight
    assert peak_memory(tied, torch.ones(1, 6)) == (36 + 6 + 2 * 6) * FLOAT


def test_peak_memory_is_the_same_every_time_and_that_of_the_plain_network() -> None:
    model, inputs = digits_cnn(), torch.rand(2, 1, 8, 8)
    first = peak_memory(model, inputs)
    lay(model, "fc1.weight", KMeans(4))
    assert {first} == {peak_memory(model, inputs) for _ in range(3)}


def test_plain_networks_are_not_copied() -> None:
    model = small()
    assert costs.plain(model) is model
    laid = shared(model)
    baked = costs.plain(laid)
    assert not laid_tensors(baked)
    assert list(laid_tensors(laid)) == ["0.weight"]
    assert torch.equal(baked[0].weight, laid[0].weight)


# --- networks whose costs cannot be stated --------------------------------------------


def data(width: int = 6) -> Task:
    pair = torch.rand(8, width), torch.arange(8) % 2
    return Task(pair, pair)


class Untold(nn.Module):
    """Computes with the weight of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.unused, self.head = nn.Linear(6, 5), nn.Linear(3, 3), nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        answer: Tensor = self.head(nn.functional.linear(inputs, self.hidden.weight).relu())
        return answer


def test_a_layer_whose_weight_is_used_without_a_call_is_refused() -> None:
    with pytest.raises(ModelError, match=r"weight of 'hidden' itself.*'!hidden'"):
        compress(Untold(), data(), [Quantize(4, activation=8)])
    result = compress(Untold(), data(), [Quantize(4, activation=8, scope=Scope("*, !hidden"))])
    found = {layer.name: layer.input_bits for layer in result.history[-1].layers}
    assert found == {"hidden.weight": 32, "unused.weight": 8, "head.weight": 8}


def test_a_network_that_takes_no_single_example_is_told_so() -> None:
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    model = nn.Sequential(nn.Linear(6, 8), norm, nn.Linear(8, 2))
    with pytest.raises(TaskError, match=r"a single example.*running statistics"):
        compress(model, data(), [Quantize(4)])


class Versioned(nn.Linear):
    """Keeps in its state dict what is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_what_a_file_cannot_hold_is_refused_before_any_step() -> None:
    model = nn.Sequential(Versioned(6, 2))
    with pytest.raises(ArtifactError, match=r"'0\._extra_state'.*make it a buffer"):
        compress(model, data(), [Quantize(4)])
    result = compress(nn.Linear(6, 2), data(), [Quantize(4)], teacher=model)
    assert len(result.history) == 2
