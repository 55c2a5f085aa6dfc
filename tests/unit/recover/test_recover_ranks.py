"""Parts on two processes: what they become, and what happens when one of them dies."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic import run as running
from laconic.errors import LaconicError, RunError
from laconic.recover import Adam, Gradient, Parallel, Reconstruct, Teacher, pipeline
from laconic.recover.fitting import Fitting
from laconic.recover.parked import parked
from laconic.recover.pipeline import balanced
from laconic.run import compress
from laconic.rundir import CHECKPOINT, read_history
from laconic.ship import load
from laconic.step import State, run_step
from laconic.tasks import Batch, Task
from laconic.weights import MovingAverage, Quantize, bake

Start = Callable[..., list[BaseProcess]]
QUANTIZE = Quantize(8, activation=MovingAverage(8))
# What is imported on the way would otherwise be imported by every process.
PRELOADED = ["laconic.run", "laconic.report.report", "sklearn.datasets", "constriction"]
PRELOADED += ["torch.utils.flop_counter", "torch._dynamo", "pytest"]
STEPS, PAUSE = 40, 0.005  # updates of a part, and seconds before each
TOKENS = 5
PATIENCE = 120  # seconds for what takes a few: other work may share the cores


class Block(nn.Module):
    """Every token looks at those that the mask shows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, hidden: Tensor, shown: Tensor) -> Tensor:
        scores = (hidden @ hidden.transpose(1, 2)).masked_fill(~shown[:, 0], -torch.inf)
        return hidden + self.outer(self.inner(scores.softmax(dim=2) @ hidden).relu())


class Chain(nn.Module):
    """Tokens [batch, TOKENS, 4] -> [batch, 3]; a mask is handed on as encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def hidden(self, inputs: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.stem(inputs)
        shown = attention_mask.bool()[:, None, None].expand(-1, 1, TOKENS, -1)
        for block in self.blocks:
            hidden = block(hidden, shown)
        return hidden

    def forward(self, inputs: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.hidden(inputs, attention_mask)[:, 0])


def chain() -> Chain:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Chain().eval()


def astray() -> Chain:
    """Return the network with noise on its numbers."""
    model, generator = chain(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(*, padded: bool = True) -> dict[str, Tensor]:
    """Return tokens, and which of them are no padding: of every example another number."""
    tokens = torch.randn(24, TOKENS, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(TOKENS) <= torch.arange(24)[:, None] % TOKENS
    return {"inputs": tokens, "attention_mask": mask if padded else torch.ones_like(mask)}


def task() -> Task:
    pair = inputs(), torch.arange(24) % 3
    return Task(pair, pair, pair)


def one_batch(*, padded: bool = True) -> Task:
    """Return the same examples as a batch that is always the same."""
    batch = Batch(inputs(padded=padded), torch.arange(24) % 3)
    loader: Any = torch.utils.data.DataLoader([batch], batch_size=None)
    return Task(loader, loader, loader, classes=("0", "1", "2"))


def asked(parts: Any, steps: int, **fields: Any) -> Reconstruct:
    solve = Gradient(steps, batch=8, optimizer=Adam(1e-2))
    return Reconstruct(parts=parts, order=Parallel(2), solve=solve, **fields)


@torch.no_grad()
def hidden(model: Any) -> Tensor:
    """Return what leaves the blocks for tokens that are no padding."""
    given = inputs()
    return model.hidden(**given)[given["attention_mask"]]


def child(out: str, own: str, port: str, options: dict[str, Any]) -> None:
    """Compress as one of two processes; leave beside the run what it has, or was refused for.

    The second takes three times as long. One of them dies or raises before an update; or both die
    while the network that came out is measured.
    """
    torch.set_num_threads(1)
    update, measure, ends = Fitting.update, running._measure, options["ends"]
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"WORLD_SIZE": "2", "RANK": own, "LOCAL_RANK": own}

    def mortal(self: Fitting, flow: Any) -> Any:
        if (own, self.finished) == (options["rank"], ends):
            if options["raises"]:
                raise RunError("it was told to end")
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(PAUSE if own == "0" else 3 * PAUSE)
        return update(self, flow)

    def fatal(state: State, label: str, seconds: float) -> None:
        if label == ends:
            os.kill(os.getpid(), signal.SIGKILL)
        measure(state, label, seconds)

    def noted(networks: Any, folder: Path) -> Any:
        every = {"", "stem", "head", *(f"blocks.{place}" for place in range(4))}
        held = [sorted(every & names) for names in networks.values()]
        Path(f"{out}.{own}.held").write_text(json.dumps(held))
        return parked(networks, folder)

    Fitting.update = mortal  # type: ignore[method-assign]
    pipeline.parked = noted
    running._measure = fatal
    exact = {"feed": Teacher()} if options["exact"] else {}
    steps = [QUANTIZE, asked(options["parts"], STEPS, **exact)]
    data = one_batch() if options["exact"] else task()
    run: Any = {"teacher": chain(), "resume": True, "device": "cpu", "checkpoint_seconds": 0.05}
    try:
        result = compress(astray(), data, steps, out=out, **run)
    except LaconicError as error:
        Path(f"{out}.{own}.error").write_text(f"{type(error).__name__}: {error}")
        sys.exit(2)
    digest = hashlib.sha256()
    for _, tensor in sorted(result.model.state_dict().items()):
        digest.update(tensor.numpy().tobytes())
    Path(f"{out}.{own}").write_text(digest.hexdigest())


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Return a function that starts two processes as torchrun would, without its agent.

    The agent would end both. They are forked from one that has imported everything.
    """
    context, started = get_context("forkserver"), []
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "passive")
        forkserver.ensure_running()

    def begin(out: Path, **asked: Any) -> list[BaseProcess]:
        options = {"parts": 2, "ends": -1, "rank": "1", "raises": False, "exact": False} | asked
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        pair = []
        for rank in ("0", "1"):
            values = {"ARGUMENTS": (str(out), rank, port, options)}
            process = context.Process(target=runpy.run_path, args=(__file__, values, "child"))
            process.start()
            pair.append(process)
        started.extend(pair)
        return pair

    yield begin
    for process in started:
        process.kill()
        process.join(PATIENCE)
        process.close()


def finish(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(PATIENCE)
    return [process.exitcode for process in processes]


def test_two_processes_make_one_network_and_one_writes(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert finish(start(out)) == [0, 0]
    assert (tmp_path / "run.0").read_text() == (tmp_path / "run.1").read_text()
    assert {path.name for path in out.iterdir()} == {
        *("model.safetensors", "checkpoint.safetensors", "history.json", "recipe.yaml"),
        *("run.json", "report.html", ".lock"),
    }
    held = [json.loads((tmp_path / f"run.{rank}.held").read_text()) for rank in (0, 1)]
    (first, second), every = (names[0] for names in held), [f"blocks.{n}" for n in range(4)]
    assert held == [[first] * 2, [second] * 2], "teacher's and student's"
    cut = len(first) - 2  # where it lies depends on how long the blocks take
    assert 0 < cut < 4 and first == ["", *every[:cut], "stem"] and second == every[cut:]
    found: Any = load(out / "model.safetensors", model=chain())
    far, near = (
        float((hidden(each) - hidden(chain())).square().mean()) for each in (astray(), found)
    )
    assert near < 0.5 * far


def test_features_travel_with_their_mask(start: Start, tmp_path: Path) -> None:
    """Fed by the teacher with a batch that is always the same, nothing depends on who is faster."""

    def alone(*, padded: bool) -> dict[str, Tensor]:
        state = State(astray(), one_batch(padded=padded), teacher=(chain(),))
        run_step(QUANTIZE, state)
        run_step(asked("block", STEPS, feed=Teacher()), state)
        bake(state.model)
        return dict(state.model.named_parameters())

    out = tmp_path / "run"
    # Where parts are cut that are only counted depends on how long blocks take.
    assert finish(start(out, parts="block", exact=True)) == [0, 0]
    assert (tmp_path / "run.0").read_text() == (tmp_path / "run.1").read_text()
    found: Any = load(out / "model.safetensors", model=chain())
    wanted, other = alone(padded=True), alone(padded=False)
    assert wanted.keys() == {name for name, _ in found.named_parameters()}
    for name, parameter in wanted.items():
        torch.testing.assert_close(found.get_parameter(name), parameter, msg=name)
    last = "blocks.3.inner.weight"
    assert not torch.allclose(wanted[last], other[last], rtol=0, atol=0.01)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_where_one_raises_all_end(start: Start, tmp_path: Path, rank: str) -> None:
    processes = start(tmp_path / "run", ends=25, rank=rank, raises=True)
    assert finish([processes.pop(int(rank))]) == [2]
    raised = time.monotonic()
    assert finish(processes) == [2]
    assert time.monotonic() - raised < 10
    told = {each: (tmp_path / f"run.{each}.error").read_text() for each in ("0", "1")}
    assert told.pop(rank).endswith("it was told to end")
    assert re.match(r"RunError: .*has ended or cannot be reached", *told.values())


@pytest.mark.parametrize("dies", [25, STEPS - 1], ids=["at work", "while the other waits for it"])
def test_where_one_dies_the_other_ends_and_both_resume(
    start: Start, tmp_path: Path, dies: int
) -> None:
    out = tmp_path / "run"
    processes = start(out, ends=dies)
    assert finish(processes[1:]) == [-signal.SIGKILL]
    died = time.monotonic()
    assert finish(processes[:1]) == [2]
    assert time.monotonic() - died < 10
    told = (tmp_path / "run.0.error").read_text()
    who = r"RunError: steps\.1 \(reconstruct\): (reconstruct: )?(rank 1|another rank) has ended"
    assert re.match(who, told)
    assert "resume the run" in told
    kept = {path.name for path in out.glob("checkpoint-*")}
    assert kept == {"checkpoint-0.safetensors", "checkpoint-1.safetensors"}
    # It would die again if it began anew.
    assert finish(start(out, ends=2)) == [0, 0]
    assert (tmp_path / "run.0").read_text() == (tmp_path / "run.1").read_text()
    assert not [*out.glob("checkpoint-*")]
    made = read_history(out)[0][-1]
    assert [len(curve) for curve in made.curves.values()] == [STEPS, STEPS]
    assert made.seconds > STEPS * PAUSE


def test_what_was_learned_is_kept_until_it_was_measured(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert finish(start(out, ends="reconstruct")) == [-signal.SIGKILL] * 2
    assert {path.name for path in out.glob("checkpoint-*")} == {
        *("checkpoint-0.safetensors", "checkpoint-1.safetensors")
    }
    assert finish(start(out, ends=2)) == [0, 0]


def test_more_processes_than_parts_are_refused(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert finish(start(out, parts=1)) == [2, 2]
    for rank in (0, 1):
        told = (tmp_path / f"run.{rank}.error").read_text()
        assert told.startswith("RecipeError: steps.1 (reconstruct): there are 2 processes and 1")
    assert not (out / CHECKPOINT).exists()  # before any work


@pytest.mark.parametrize(
    ("costs", "count", "cuts"),
    [
        ([1, 1, 1, 1], 2, [0, 2, 4]),
        ([5, 1, 1, 1], 2, [0, 1, 4]),
        ([1, 1, 1, 5], 3, [0, 1, 3, 4]),
        ([2, 2], 2, [0, 1, 2]),
        ([3], 1, [0, 1]),
    ],
)
def test_cuts_balance_the_largest_piece(costs: list[float], count: int, cuts: list[int]) -> None:
    assert balanced(costs, count) == cuts


if __name__ == "child":
    child(*ARGUMENTS)  # type: ignore[name-defined]  # noqa: F821
