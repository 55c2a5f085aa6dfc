"""Measurement: bytes that add up, costs counted by hand, and the ledger of a run."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from laconic import costs
from laconic.budget import Budget
from laconic.errors import RunError
from laconic.ledger import Layer, Measurement, factor_text, ledger, ledger_table, size_text
from laconic.measure import (
    averaged,
    bit_operations,
    environment,
    float_bytes,
    latency,
    macs,
    measure,
    peak_memory,
)
from laconic.models import digits_cnn
from laconic.tasks import Task
from laconic.tasks.split import Batch
from laconic.weights.codebook import KMeans
from laconic.weights.laid import Laid, laid_tensors, lay
from laconic.weights.representation import Float

FLOAT = 4  # bytes of a float32


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))


def small_task(**options: Any) -> Task:
    inputs, targets = torch.randn(30, 10), torch.arange(30) % 5
    return Task((inputs, targets), (inputs[:10], targets[:10]), **options)


def half(weight: Tensor) -> Tensor:
    """Return a mask that keeps every second number."""
    return (torch.arange(weight.numel()) % 2 == 0).reshape(weight.shape)


def pruned(model: nn.Sequential) -> nn.Sequential:
    model = copy.deepcopy(model)
    lay(model, "0.weight", Float(), mask=half(model[0].weight))
    return model


def shared(model: nn.Sequential, bits: int = 3) -> nn.Sequential:
    model = pruned(model)
    lay(model, "0.weight", KMeans(bits))
    return model


@pytest.fixture
def history() -> list[Measurement]:
    model, task = small(), small_task()
    steps = {"original": model, "prune": pruned(model), "quantize": shared(model)}
    return [
        measure(network, task, step=step, seconds=1.5, latency=False)
        for step, network in steps.items()
    ]


# --- bytes ----------------------------------------------------------------------------


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


# --- the record -----------------------------------------------------------------------


def test_a_measurement_survives_json(history: list[Measurement]) -> None:
    for found in [*history, measure(small())]:
        text = json.dumps(found.to_data(), allow_nan=False)
        assert Measurement.from_data(json.loads(text)) == found


def test_a_loss_that_is_no_number_survives_json() -> None:
    def infinite(outputs: Tensor, batch: Batch) -> Tensor:
        return outputs.sum() * 0 + math.inf

    found = measure(small(), small_task(loss=infinite), latency=False)
    text = json.dumps(found.to_data(), allow_nan=False)
    assert Measurement.from_data(json.loads(text)).metrics["loss"] == math.inf


def test_curves_survive_json_and_older_histories_have_none() -> None:
    losses = {"fc": [3.0, 2.0, math.inf], "train: label": [1 / 3]}
    found = measure(small(), curves=losses)
    data = json.loads(json.dumps(found.to_data(), allow_nan=False))
    assert Measurement.from_data(data).curves == {
        "fc": (3.0, 2.0, math.inf),
        "train: label": (0.333333,),
    }
    del data["curves"]
    assert Measurement.from_data(data) == dataclasses.replace(found, curves={})


def test_a_history_holds_few_digits_of_few_points() -> None:
    draws = random.Random(0)
    found = measure(small(), curves={"fc": [draws.random() for _ in range(10_000)]})
    assert len(found.curves["fc"]) == 100
    assert len(json.dumps(found.to_data()["curves"])) < 1100
    assert averaged([draws.random() for _ in range(150)])[-1] > 0
    assert averaged([5.0, 3.0, 1.0], points=2) == (5.0, 2.0)
    assert averaged([]) == ()


@pytest.mark.parametrize("place", ["measurement", "layer"])
def test_a_record_of_another_version_is_refused(place: str) -> None:
    data = measure(small()).to_data()
    fields = data if place == "measurement" else data["layers"][0]
    del fields["nonzero"]
    fields["colour"] = 1
    with pytest.raises(RunError, match=f"a {place} .* colour, nonzero"):
        Measurement.from_data(data)


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


def test_budgets_read_measurements(history: list[Measurement]) -> None:
    whole, prune, _ = (found.to_data() for found in history)
    budget = Budget("bit_operations <= 0.5x, macs <= 1x, nonzero <= 1 K")
    exceeded = budget.exceeded_by(prune, whole)
    assert exceeded == {"bit_operations": 200 * 1024 - 150 * 1024}


# --- the ledger -----------------------------------------------------------------------


def test_factors_of_the_steps_multiply(history: list[Measurement]) -> None:
    rows = ledger(history)
    assert [row.step for row in rows] == ["original", "prune", "quantize"]
    for total, factor in (("measured_total", "measured"), ("nominal_total", "nominal")):
        product = math.prod(getattr(row, factor) for row in rows)
        assert getattr(rows[-1], total) == pytest.approx(product, rel=1e-12)
    assert rows[0].measured == rows[0].nominal == 1.0
    assert rows[-1].measured_total == history[0].size_bytes / history[-1].size_bytes
    assert rows[1].nominal == (325 * 32) / ((100 + 125) * 32)


def test_shares_of_the_file(history: list[Measurement]) -> None:
    whole, prune, quantize = ledger(history)
    assert (whole.index_share, whole.table_share, prune.table_share) == (0.0, 0.0, 0.0)
    assert prune.index_share == history[1].index_bytes / history[1].size_bytes > 0
    assert quantize.table_share == history[2].table_bytes / history[2].size_bytes > 0


def test_the_table_says_what_the_ledger_says(history: list[Measurement]) -> None:
    table = ledger_table(history)
    assert {len(row) for row in table.rows} == {len(table.columns)}
    last = dict(zip(table.columns, table.rows[-1], strict=True))
    row = ledger(history)[-1]
    assert last["Step"] == "quantize"
    assert last["Size"] == size_text(row.size_bytes)
    assert last["File, all"] == factor_text(row.measured_total)
    assert last["Accuracy"] == f"{100 * row.metrics['accuracy']:.2f}%"
    assert last["Parameters"] == "325"
    assert last["Time"] == "1.5 s"
    assert "Loss" not in table.columns


def test_a_metric_beyond_one_is_no_percentage(history: list[Measurement]) -> None:
    values = {"perplexity": 12.34567, "f1": 0.5}
    first = {**history[0].to_data(), "metrics": values}
    second = {**history[1].to_data(), "metrics": {"f1": "nan"}}
    table = ledger_table([Measurement.from_data(first), Measurement.from_data(second)])
    columns = {name: cells for name, *cells in zip(table.columns, *table.rows, strict=True)}
    assert columns["Perplexity"] == ["12.35", "-"]
    assert columns["F1"] == ["50.00%", "nan%"]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB (0.98 KiB)"),
        (26_500, "26.5 kB (25.9 KiB)"),
        (999_999, "1.00 MB (976.6 KiB)"),
        (437_928_960, "437.9 MB (417.6 MiB)"),
        (5 * 10**15, "5000.0 TB (4547.5 TiB)"),
    ],
)
def test_sizes_are_printed_in_both_units(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("factor", "text"), [(1, "1.00x"), (9.996, "10.0x"), (99.96, "100x"), (1234.5, "1234x")]
)
def test_factors_have_three_digits(factor: float, text: str) -> None:
    assert factor_text(factor) == text


def test_environment_is_jsonable_and_names_what_results_depend_on() -> None:
    found = json.loads(json.dumps(environment()))
    assert {"python", "torch", "numpy", "laconic", "threads", "cpu", "precision"} <= set(found)
    assert found["torch"] == torch.__version__
    assert found["cpu"]


def test_plain_networks_are_not_copied() -> None:
    model = small()
    assert costs.plain(model) is model
    laid = shared(model)
    baked = costs.plain(laid)
    assert not laid_tensors(baked)
    assert list(laid_tensors(laid)) == ["0.weight"]
    assert torch.equal(baked[0].weight, laid[0].weight)


def test_a_history_of_before_widths_of_inputs_is_read() -> None:
    data = measure(digits_cnn()).to_data()
    for layer in data["layers"]:
        del layer["input_bits"]
    assert {layer.input_bits for layer in Measurement.from_data(data).layers} == {32}
