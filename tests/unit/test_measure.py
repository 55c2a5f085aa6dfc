"""Measurement: bytes that add up, what layers and histograms say, and what a task adds."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.measured import FLOAT, pruned, shared, small, small_task
from laconic.measure import environment, float_bytes, macs, measure, peak_memory
from laconic.models import digits_cnn
from laconic.run import compress
from laconic.structure import Prune
from laconic.tasks import Task
from laconic.weights import Gobo, MinMax, attach_
from laconic.weights.codebook import KMeans
from laconic.weights.laid import laid_tensors, lay


@pytest.mark.parametrize("change", [copy.deepcopy, pruned, shared])
def test_size_is_that_of_the_file_and_the_sum_of_its_parts(change: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    found = measure(change(small()), path=path)
    assert found.size_bytes == path.stat().st_size
    parts = (found.code_bytes, found.index_bytes, found.table_bytes)
    assert found.size_bytes == sum(parts) + found.dense_bytes + found.header_bytes
    for name, part in zip(("code_bytes", "index_bytes", "table_bytes"), parts, strict=True):
        assert sum(getattr(layer, name) for layer in found.layers) == part
    biases = (20 + 5) * FLOAT
    assert found.dense_bytes == biases + sum(layer.dense_bytes for layer in found.layers)
    assert (
        sum(layer.size_bytes for layer in found.layers) == sum(parts) + found.dense_bytes - biases
    )


def test_measuring_leaves_no_file_and_no_change_behind(tmp_path: Path) -> None:
    model, task = shared(small()).train(), small_task()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draws = torch.get_rng_state()
    measure(model, task)
    assert torch.equal(torch.get_rng_state(), draws)
    assert [module.training for module in model] == [True, False, True]
    assert list(laid_tensors(model)) == ["0.weight"]
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_task_travels_in_the_measured_file() -> None:
    bare, named = small_task(), small_task(classes=["a" * 100, *"bcde"])
    assert measure(small(), named, latency=False).size_bytes > (
        measure(small(), bare, latency=False).size_bytes + 90
    )


def test_layers_say_what_is_stored() -> None:
    model = small()
    first, second = measure(shared(model)).layers
    assert (first.name, first.shape, first.parameters) == ("0.weight", (20, 10), 200)
    assert (first.survivors, first.nonzero, first.bits) == (100, 100, 3.0)
    assert (first.representation, first.dense_bytes) == ("kmeans 3 bit", 0)
    assert first.index_bytes > 0
    assert first.table_bytes >= 8 * FLOAT
    assert (second.representation, second.bits, second.dense_bytes) == ("float", 32.0, 100 * FLOAT)
    masked = measure(pruned(model)).layers[0]
    assert (masked.representation, masked.bits, masked.code_bytes) == ("float", 32.0, 100 * FLOAT)


def test_a_survivor_may_be_zero() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0.0, 9.0, 9.0], [9.0, 0.0, 9.0, 0.0]]))
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 3] = False
    lay(model, "0.weight", KMeans(1), mask=mask)
    layer = measure(model).layers[0]
    assert (layer.survivors, layer.nonzero) == (7, 3)


def test_everything_pruned_has_no_survivors() -> None:
    model = small()
    lay(model, "0.weight", KMeans(4), mask=torch.zeros(20, 10, dtype=torch.bool))
    found = measure(model)
    layer = found.layers[0]
    assert (layer.survivors, layer.nonzero, layer.bits) == (0, 0, 4.0)
    assert sum(layer.histogram["counts"]) == 0
    assert layer.histogram["high"] == 0
    assert found.nominal_bits == 32 * (100 + 25)


def test_a_shared_parameter_counts_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    lay(model, "0.weight", KMeans(2))
    found = measure(model)
    assert [layer.name for layer in found.layers] == ["0.weight"]
    assert found.parameters == 36 + 12
    assert found.nominal_bits == 2 * 36 + 32 * 12
    assert macs(model, torch.ones(1, 6)) == {"": 72, "0.weight": 72}


def test_laid_vectors_are_layers_too() -> None:
    model = small()
    lay(model, "0.bias", KMeans(2))
    found = measure(model)
    layer = next(layer for layer in found.layers if layer.name == "0.bias")
    assert (layer.bits, layer.parameters, layer.macs) == (2.0, 20, None)
    assert found.nominal_bits == 2 * 20 + 32 * (200 + 100 + 5)


def test_histogram_holds_the_weights_that_are_not_zero() -> None:
    layer = measure(pruned(small())).layers[0]
    assert len(layer.histogram["counts"]) == 41
    assert sum(layer.histogram["counts"]) == layer.nonzero == 100
    assert layer.histogram["low"] == -layer.histogram["high"] < 0


def test_histogram_survives_a_network_that_diverged() -> None:
    model = small()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
        model[0].weight[0, 1] = math.inf
    assert sum(measure(model).layers[0].histogram["counts"]) == 198


def test_float_bytes_are_those_of_a_plain_file(tmp_path: Path) -> None:
    model = digits_cnn()
    path = tmp_path / "plain.safetensors"
    save_file(model.state_dict(), path)
    assert float_bytes(model) == path.stat().st_size
    lay(model, "fc1.weight", KMeans(2))
    assert float_bytes(model) == path.stat().st_size


def test_float_bytes_widen_and_store_a_shared_tensor_once() -> None:
    narrow, wide = nn.Linear(64, 64).half(), nn.Linear(64, 64)
    assert float_bytes(narrow) == float_bytes(wide)
    tied = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    whole = float_bytes(tied)
    tied[1].weight = tied[0].weight
    assert whole - float_bytes(tied) == pytest.approx(64 * 64 * FLOAT, abs=100)


def test_without_a_task_nothing_is_run() -> None:
    found = measure(small())
    assert (found.macs, found.bit_operations, found.latency_ms) == (None, None, None)
    assert (found.peak_memory_bytes, found.metrics) == (None, {})
    assert all(layer.macs is None for layer in found.layers)


def test_with_a_task_everything_is_measured() -> None:
    model, task = small(), small_task()
    found = measure(model, task, step="original", seconds=2.0, split="validate")
    assert (found.step, found.seconds, found.parameters) == ("original", 2.0, 325)
    assert found.nonzero == sum(int((tensor != 0).sum()) for tensor in model.parameters())
    assert found.metrics == task.score(model, "validate")
    assert found.latency_ms is not None
    assert found.latency_ms > 0
    one = torch.ones(1, 10)
    assert found.peak_memory_bytes == peak_memory(model, one)
    assert found.macs == 300 == sum(layer.macs or 0 for layer in found.layers)


def test_a_small_network_is_measured_in_well_under_a_second() -> None:
    model, task = shared(small()), small_task()
    measure(model, task)
    start = time.perf_counter()
    measure(model, task)
    assert time.perf_counter() - start < 0.8


def test_environment_is_jsonable_and_names_what_results_depend_on() -> None:
    found = json.loads(json.dumps(environment()))
    assert {"python", "torch", "numpy", "laconic", "threads", "cpu", "precision"} <= set(found)
    assert found["torch"] == torch.__version__
    assert found["cpu"]


def test_weights_that_are_kept_as_they_are_count_as_numbers() -> None:
    model = nn.Sequential(nn.Linear(40, 30, bias=False))
    lay(model, "0.weight", gobo := Gobo(3, threshold=1.0))
    with torch.no_grad():
        outliers = int(gobo.fit(laid_tensors(model)["0.weight"][1])["outlier"].sum())
    assert 0 < outliers < 1200
    found = measure(model)
    assert found.nominal_bits == pytest.approx(4 * 1200 + 32 * outliers, abs=1)
    assert found.layers[0].representation.startswith("gobo ")


@pytest.mark.parametrize("rounded", ["first", "second", "both"])
def test_a_tied_weight_counts_the_widest_input_of_its_layers(rounded: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Linear(4, 4, bias=False) for _ in range(2))
            self.second.weight = self.first.weight

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self.second(self.first(inputs).relu())
            return answer

    model, data = Twice(), (torch.rand(4, 4), torch.arange(4))
    names = ("first", "second") if rounded == "both" else (rounded,)
    attach_(model, {name: {"input": MinMax(8)} for name in names})
    found = measure(model, Task(data, data, data))
    assert found.layers[0].input_bits == (8 if rounded == "both" else 32)
    assert found.bit_operations == 2 * 16 * 32 * found.layers[0].input_bits


def test_a_loss_that_is_no_number_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Divided(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            answer: Tensor = super().forward(inputs)
            return answer / self[0].weight.abs().min()

    pair = torch.rand(24, 6), torch.arange(24) % 3
    task = Task.from_arrays(pair, pair)
    with caplog.at_level(logging.WARNING):
        compress(Divided(nn.Linear(6, 3)), task, [Prune("weights", keep=0.5)])
    assert [record.message.partition(": ")[0] for record in caplog.records] == ["prune"]
    assert "the loss is not finite" in caplog.text
