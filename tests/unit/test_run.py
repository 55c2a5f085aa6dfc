"""compress(): what it returns, keeps, refuses, and what Ctrl-C does to it."""

from __future__ import annotations

import functools
import json
import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laconic
from laconic import measure as measuring
from laconic import run, rundir
from laconic.budget import Budget
from laconic.errors import (
    BudgetError,
    LaconicError,
    ModelError,
    RecipeError,
    RunError,
    ScopeError,
    TaskError,
)
from laconic.models import digits_cnn
from laconic.recipe import Recipe
from laconic.recover import SGD, Constant, Train
from laconic.run import compress, pick_device
from laconic.rundir import read_history
from laconic.ship import container, load, verify
from laconic.step import State, Step, Value
from laconic.structure import Prune
from laconic.tasks import Task
from laconic.weights import KMeans, Quantize, Ternary
from laconic.weights.laid import laid_tensors

FILES = {*rundir.FILES, ".lock"}
STEPS: list[Step] = [
    Prune("weights", keep=0.5),
    Quantize(KMeans(2)),
    Train(epochs=2, batch=8, optimizer=SGD(0.05)),
]


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()


def inputs() -> Tensor:
    return torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


def task(**options: Any) -> Task:
    pair = inputs(), torch.arange(24) % 3
    return Task(pair, pair, pair, **options)


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure without timing forwards."""
    monkeypatch.setattr(measuring, "measure", functools.partial(measuring.measure, latency=False))


def same_bytes(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.detach().view(torch.int32), right.detach().view(torch.int32))


# ------------------------------------------------------------------ what it returns


def test_the_history_holds_the_original_and_every_step() -> None:
    result = compress(network(), task(), STEPS)
    assert [measured.step for measured in result.history] == [
        "original",
        "prune",
        "quantize",
        "train",
    ]
    # A BatchNorm's biases begin at zero.
    assert [measured.nonzero for measured in result.history[:2]] == [99 - 8, 99 - 8 - 36]
    assert result.history[2].nominal_bits < result.history[1].nominal_bits
    assert result.history[0].seconds == 0
    assert all(measured.seconds > 0 for measured in result.history[1:])


def test_steps_and_a_recipe_are_the_same() -> None:
    one = compress(network(), task(), STEPS)
    two = compress(network(), task(), Recipe(STEPS))
    assert one.recipe == two.recipe == Recipe(tuple(STEPS))
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, two.model.state_dict()[name])


def test_no_step_at_all_measures() -> None:
    result = compress(network(), None, [])
    assert [measured.step for measured in result.history] == ["original"]


def test_the_result_is_in_evaluation_mode() -> None:
    assert not any(
        module.training for module in compress(network().train(), None, []).model.modules()
    )


def test_baked_is_plain_and_equal_bit_for_bit_and_the_result_stays_laid() -> None:
    """Hazard 1: what torch offers would break the network that was copied."""
    result = compress(network(), task(), STEPS)
    with torch.no_grad():
        outputs = result.model(inputs())
    plain = result.baked()
    assert [type(module) for module in plain] == [type(module) for module in network()]
    assert laid_tensors(plain) == {}
    assert same_bytes(plain(inputs()), outputs)
    assert set(laid_tensors(result.model)) == {"0.weight", "3.weight"}
    assert same_bytes(result.model(inputs()), outputs)
    assert same_bytes(result.baked()[0].weight, plain[0].weight)  # type: ignore[index]


def test_what_is_saved_computes_the_same(tmp_path: Path) -> None:
    result = compress(network(), task(), STEPS)
    size = result.save(tmp_path / "model.safetensors")
    assert size == (tmp_path / "model.safetensors").stat().st_size
    loaded = load(tmp_path / "model.safetensors", model=network())
    assert same_bytes(loaded(inputs()), result.model(inputs()))
    # The probe that verify compares makes it a little larger than what was measured.
    assert result.history[-1].size_bytes <= size


def test_the_report_is_written(tmp_path: Path) -> None:
    path = compress(network(), task(), STEPS).report(tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    assert "quantize" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("budget", "exceeded"),
    [
        (None, {}),
        ("nonzero <= 55", {}),
        ("nonzero <= 52", {"nonzero": 3}),
        ("nonzero <= 0.5x, parameters <= 1x", {"nonzero": 55 - 45.5}),
    ],
)
def test_what_the_budget_is_exceeded_by(budget: str | None, exceeded: dict[str, float]) -> None:
    recipe = Recipe([Prune("weights", keep=0.5)], budget=None if budget is None else Budget(budget))
    assert compress(network(), None, recipe).exceeded() == exceeded


def test_a_budget_on_what_is_not_measured_is_refused_before_any_step(tmp_path: Path) -> None:
    recipe = Recipe([Prune("weights", keep=0.5)], budget="macs <= 0.5x")
    with pytest.raises(BudgetError, match="macs, which was not measured"):
        compress(network(), None, recipe, out=tmp_path)
    assert not (tmp_path / rundir.CHECKPOINT).exists()


def test_facts_name_what_the_bytes_depend_on() -> None:
    facts = compress(network(), task(), Recipe(STEPS, seed=4, precision="bfloat16")).facts
    environment = facts["environment"]
    assert facts["seed"] == 4
    assert environment["trained_in"] == "bfloat16"
    assert environment["threads"] == torch.get_num_threads()
    assert environment["torch"] == torch.__version__
    assert environment["device"] in ("cpu", "cuda")
    assert environment["precision"]["matmul"] == torch.get_float32_matmul_precision()
    assert json.loads(json.dumps(facts)) == facts


def test_the_name_of_a_step_may_come_twice_with_draws_of_its_own() -> None:
    fit = Train(epochs=1, batch=8, optimizer=SGD(0.05, decay=Constant()))
    seeds: list[int] = []

    class Listen(Step):
        def apply(self, state: State) -> None:
            seeds.append(state.seed)

    Value._registry[Step].pop("listen")
    compress(network(), task(), [Listen(), fit, Listen()])
    compress(network(), task(), [fit, Listen(), fit, fit, Listen()])
    assert seeds[:2] == seeds[2:], "a step of another kind changed what this one draws"
    assert seeds[0] != seeds[1]


# ------------------------------------------------------------------ what it keeps


def test_a_run_directory_holds_all_there_is_to_know(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    result = compress(network(), task(), STEPS, out=out)
    assert result.out == out
    assert {path.name for path in out.iterdir()} == FILES
    history, facts = read_history(out)
    assert history == result.history
    assert facts == result.facts
    assert Recipe.read(out / rundir.RECIPE) == result.recipe
    assert verify(out / rundir.ARTIFACT)
    loaded = load(out / rundir.ARTIFACT, model=network())
    assert same_bytes(loaded(inputs()), result.model(inputs()))


def test_without_a_directory_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compress(network(), task(), STEPS).out is None
    assert list(tmp_path.iterdir()) == []


def test_with_and_without_a_directory_the_result_is_the_same(tmp_path: Path) -> None:
    kept = compress(network(), task(), STEPS, out=tmp_path, checkpoint_seconds=0)
    free = compress(network(), task(), STEPS)
    for name, tensor in kept.model.state_dict().items():
        assert torch.equal(tensor, free.model.state_dict()[name])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / rundir.HISTORY).unlink(), r"holds no run \(history.json is missing\)"),
        (lambda out: (out / rundir.RUN).unlink(), r"holds no run \(run.json is missing\)"),
        (lambda out: (out / rundir.HISTORY).write_text("[{"), "the run cannot be read"),
        (lambda out: (out / rundir.HISTORY).write_text("[3]"), "the run cannot be read"),
        (lambda out: (out / rundir.HISTORY).write_text('[{"step": 1}]'), "history|fields"),
    ],
)
def test_a_damaged_history_is_refused(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    compress(network(), None, [], out=tmp_path)
    damage(tmp_path)
    with pytest.raises(RunError, match=message):
        read_history(tmp_path)


def test_a_file_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "history.json"
    container.write_file(path, b"first")

    def fail(partial: Path, path: Path) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(container, "_replace", fail)
    with pytest.raises(OSError, match="power cut"):
        container.write_file(path, b"second")
    assert path.read_text() == "first"


# ------------------------------------------------------------------ what it refuses


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ScopeError, match=r"steps\.1 \(quantize\)"):
        compress(network(), task(), [STEPS[0], Quantize(4, scope="nowhere")], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, why in (("file", "is a file"), ("file/run", "the run cannot be kept there")):
        with pytest.raises(RunError, match=why) as caught:
            compress(network(), None, [], out=tmp_path / out)
        assert str(caught.value).startswith(str(tmp_path / out))
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("name", [name for name in rundir.FILES if name != rundir.RECIPE])
def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "in the way").mkdir(parents=True)
    with pytest.raises(LaconicError, match=f"{tmp_path}.*{name}"):
        compress(network(), None, [STEPS[0]], out=tmp_path)


def test_a_directory_in_use_is_refused_and_free_again_afterwards(tmp_path: Path) -> None:
    in_use = pytest.raises(RunError, match="in use by another run; choose another directory")
    with rundir.Keeper(tmp_path, {}, 300).locked(), in_use:
        compress(network(), None, [], out=tmp_path)
    compress(network(), None, [], out=tmp_path)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (("digits_cnn", None, []), ModelError, "takes a network .nn.Module., got str"),
        ((network(), (1, 2), []), TaskError, "takes a Task, got tuple; write Task"),
        ((network(), None, STEPS[0]), RecipeError, r"takes a list of steps, got .*write \[step\]"),
        ((network(), None, "recipe.yaml"), RecipeError, r"Recipe\.read"),
        (
            (nn.Linear(2, 2, device="meta"), None, []),
            ModelError,
            "'weight' of Linear is on .*'meta'",
        ),
    ],
)
def test_what_is_given_in_the_place_of_something_else(given: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        compress(*given)


def test_progress_is_shown_where_it_is_asked_for(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes standard error for a terminal
    steps = [Train(epochs=2, batch=8)]
    silent = compress(network(), task(), steps)
    assert capfd.readouterr() == ("", "")
    shown = compress(network(), task(), steps, progress=True)
    assert "train 2 epochs" in capfd.readouterr().err
    assert shown.history[-1].metrics == silent.history[-1].metrics
    assert len(repr(shown)) < 2000


def test_a_loss_that_never_was_finite_is_no_matter_of_the_rate(tmp_path: Path) -> None:
    model = network()
    next(model.parameters()).data[0] = float("nan")
    with pytest.raises(RunError, match=r"before anything was learned; look for numbers"):
        compress(model, task(), [Train(epochs=1, batch=8)])


def test_a_step_that_fails_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    broken = [STEPS[0], Train(epochs=3, batch=8, optimizer=SGD(1e30))]
    with pytest.raises(RunError, match=r"^steps\.1 \(train\): .* lower the learning rate"):
        compress(network(), task(), broken, out=tmp_path)
    assert [measured.step for measured in read_history(tmp_path)[0]] == ["original", "prune"]
    assert not (tmp_path / rundir.ARTIFACT).exists()
    with pytest.raises(RunError, match="lower the learning rate"):
        compress(network(), task(), broken, out=tmp_path, resume=True)


@pytest.mark.parametrize("device", ["cuda:77", "nowhere"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(RunError, match=f"device '{device}' cannot be used here"):
        pick_device(device)


# ------------------------------------------------------------------ precision


@pytest.mark.parametrize(
    ("asked", "device", "fast", "got"),
    [
        ("float32", "cpu", True, "float32"),
        ("bfloat16", "cpu", False, "bfloat16"),
        ("auto", "cpu", True, "bfloat16"),
        ("auto", "cpu", False, "float32"),
        ("auto", "cuda:0", True, "bfloat16"),
        ("auto", "cuda", False, "float32"),
        ("auto", "mps", True, "float32"),
    ],
)
def test_auto_looks_at_what_the_run_computes_on(
    monkeypatch: pytest.MonkeyPatch, asked: str, device: str, fast: bool, got: str
) -> None:
    processor, gpu = (fast, not fast) if device == "cpu" else (not fast, fast)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: processor)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: processor)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu)
    assert run.pick_precision(asked, device) == got


# ------------------------------------------------------------------ Ctrl-C


def interrupting(at: int, times: int = 1, number: int = signal.SIGINT) -> Task:
    """Return a task whose training presses Ctrl-C, or sends a signal, in its n-th update."""
    count = [0]
    data = task()
    call = data.call

    def press(model: nn.Module, batch: Any) -> Tensor:
        count[0] += model.training
        if count[0] == at and model.training:
            for _ in range(times):
                signal.raise_signal(number)
        return call(model, batch)

    data.call = press
    return data


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_writes_a_checkpoint_at_the_next_update(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    before = signal.getsignal(number)
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        compress(network(), interrupting(4, number=number), STEPS, out=tmp_path)
    assert signal.getsignal(number) is before
    assert caplog.messages == ["interrupted: writing a checkpoint; once more to stop at once"]
    counters = rundir.read(tmp_path / rundir.CHECKPOINT)[0]["counters"]
    assert (counters["epoch"], counters["batch"]) == (1, 1)
    resumed = compress(network(), task(), STEPS, out=tmp_path, resume=True)
    whole = compress(network(), task(), STEPS)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])


def test_ctrl_c_twice_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(network(), interrupting(4, times=2), STEPS, out=tmp_path)
    assert rundir.read(tmp_path / rundir.CHECKPOINT)[0]["counters"] is None


def test_ctrl_c_outside_training_stops_after_the_step(tmp_path: Path) -> None:
    class Press(Step):
        def apply(self, state: State) -> None:
            signal.raise_signal(signal.SIGINT)

    Value._registry[Step].pop("press")
    with pytest.raises(KeyboardInterrupt):
        compress(network(), None, [Press(), STEPS[0]], out=tmp_path)
    assert [measured.step for measured in read_history(tmp_path)[0]] == ["original", "press"]


def test_ctrl_c_without_a_directory_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(network(), interrupting(1), STEPS)


def test_a_handler_of_the_users_own_stays(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        compress(network(), interrupting(4, number=signal.SIGTERM), STEPS, out=tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_a_program_that_ignores_ctrl_c_goes_on_ignoring_it(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = compress(network(), interrupting(4), STEPS, out=tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(result.history) == 4


def test_another_thread_may_run_it(tmp_path: Path) -> None:
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(compress(network(), task(), STEPS, out=tmp_path))
    )
    thread.start()
    thread.join()
    assert len(results[0].history) == 4


# ------------------------------------------------------------------ callers of all kinds


def test_a_network_that_is_laid_already_is_compressed_on() -> None:
    """Hazard 1: a copy of a laid network is pruned, quantised and baked; the caller's is not."""
    model = network()
    laconic.lay(model, "0.weight", Ternary())
    before = model(inputs())
    result = compress(model, task(), [Quantize("float"), *STEPS])
    result.baked()
    assert same_bytes(model(inputs()), before)
    assert set(laid_tensors(model)) == {"0.weight"}
    assert set(laid_tensors(result.model)) == {"0.weight", "3.weight"}


def test_errors_are_laconics_own() -> None:
    class Trip(Step):
        def apply(self, state: State) -> None:
            raise ZeroDivisionError("over nothing")

    Value._registry[Step].pop("trip")
    with pytest.raises(LaconicError, match=r"steps\.0 \(trip\): ZeroDivisionError: over nothing"):
        compress(network(), None, [Trip()])


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / rundir.ARTIFACT).write_bytes(b"trained for weeks")
    with pytest.raises(RunError, match=r"holds model\.safetensors, which would be lost"):
        compress(digits_cnn(), None, [Quantize(8)], out=encoder)
    assert [path.name for path in encoder.iterdir()] == [rundir.ARTIFACT]
    assert (encoder / rundir.ARTIFACT).read_bytes() == b"trained for weeks"


@pytest.mark.parametrize(
    "beside", [{}, *({rundir.RUN: text} for text in ('{"wandb": 2}', "[]", "{"))]
)
@pytest.mark.parametrize("name", [rundir.RECIPE, rundir.ARTIFACT])
def test_what_no_run_has_written_is_not_lost(
    tmp_path: Path, name: str, beside: dict[str, str]
) -> None:
    there = {name: "# the work of an evening"} | beside
    for each, text in there.items():
        (tmp_path / each).write_text(text)
    with pytest.raises(RunError, match=r"is not the folder of a run and holds .*, which would be"):
        compress(digits_cnn(), None, [Quantize(8)], out=tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == there


@pytest.mark.parametrize("resume", [False, True])
def test_a_network_whose_checkpoint_is_gone_is_not_lost(tmp_path: Path, resume: bool) -> None:
    compress(digits_cnn(), None, [Quantize(8)], out=tmp_path)
    (tmp_path / rundir.CHECKPOINT).unlink()
    before = (tmp_path / rundir.ARTIFACT).read_bytes()
    with pytest.raises(RunError, match=r"whose checkpoint\.safetensors is gone"):
        compress(digits_cnn(), None, [Quantize(4)], out=tmp_path, resume=resume)
    assert (tmp_path / rundir.ARTIFACT).read_bytes() == before


def test_a_folder_where_nothing_would_be_lost_is_taken(tmp_path: Path) -> None:
    for name in (".lock", ".run.json.partial", "original.safetensors", "notes.txt"):
        (tmp_path / name).write_text("")
    assert compress(digits_cnn(), None, [Quantize(8)], out=tmp_path).history
