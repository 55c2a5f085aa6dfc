"""Prune on axes: masked and sliced networks, counts, rounds, training, refusals, rewiring."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from laconic.errors import AxisError, LaconicError, ModelError, RecipeError
from laconic.models import resnet, vgg
from laconic.recover import Adam, Constant, Train
from laconic.scope import Scope
from laconic.step import State, Step, derive, run_step
from laconic.structure import (
    FPGM,
    OBS,
    BatchNormScale,
    Criterion,
    Geometric,
    HeadImportance,
    Magnitude,
    NeuronImportance,
    Prune,
    Random,
    Ranking,
    Rewire,
    Soft,
    Taylor,
    prune,
)
from laconic.structure.axes import Axis, Use
from laconic.structure.elements import alive, axes_of, roles
from laconic.structure.examples import example_inputs
from laconic.structure.ranking import best_elements, padded
from laconic.tasks import Task
from laconic.tasks.split import Batch
from laconic.weights import Float, KMeans, lay
from laconic.weights.laid import bake, laid_tensors, latent_of, mask_of

# A masked and a sliced network sum the same numbers, but for zeros, in another order.
CLOSE = 1e-5
WORDS = 40


def images(examples: int = 24, channels: int = 3, side: int = 8) -> Task:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(examples) % 3
    inputs = torch.randn(examples, channels, side, side, generator=generator)
    inputs += labels[:, None, None, None]
    return Task((inputs, labels), (inputs, labels), (inputs[:6], labels[:6]))


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Call a network of token ids, the last of every text padded."""
    (ids,) = batch.inputs
    return model(input_ids=ids, attention_mask=(ids > 0).long()).logits


def texts(examples: int = 24, tokens: int = 6) -> Task:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, WORDS, (examples, tokens), generator=generator)
    ids[:, -1] = 0
    labels = ids[:, 0] % 2
    data = (ids, labels)
    return Task(data, data, (ids[:6], labels[:6]), call=logits)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=24,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=20,
        max_position_embeddings=16,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return lively(transformers.BertForSequenceClassification(config))


def lively(model: nn.Module) -> nn.Module:
    """Return the network in evaluation mode, its norms and biases far from neutral."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1 and tensor.is_floating_point():
                positive = name.endswith(("running_var", "weight"))
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5 * positive)
    return model.eval()


def residual() -> nn.Module:
    torch.manual_seed(0)
    return lively(resnet(8, classes=3))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return lively(vgg("small", classes=3))


class Separable(nn.Module):
    """A depthwise convolution, a sigmoid whose value at zero is not zero, and two linears."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6, affine=False)
        self.each = nn.Conv2d(6, 6, 3, groups=6)
        self.last = nn.Conv2d(6, 4, 1)
        self.inner, self.outer = nn.Linear(4, 9), nn.Linear(9, 3)
        lively(self)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.each(torch.sigmoid(self.norm(self.first(x)))))
        x = torch.tanh(self.last(x)).mean((2, 3))
        return self.outer(torch.sigmoid(self.inner(x)))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Task], str]] = {
    "resnet channels": (residual, images, "channels"),
    "vgg channels": (plain, images, "channels"),
    "separable channels": (Separable, images, "channels"),
    "separable neurons": (Separable, images, "neurons"),
    "bert heads": (bert, texts, "heads"),
    "bert neurons": (bert, texts, "neurons"),
}
each_case = pytest.mark.parametrize("case", CASES)


def outputs(model: nn.Module, task: Task) -> Tensor:
    with torch.no_grad():
        return task.call(model.eval(), task.example_batch(6))


def found(model: nn.Module, task: Task, kind: str) -> list[Axis]:
    return axes_of(model, task, kind, Scope("*"))


def sizes(model: nn.Module, axes: list[Axis]) -> list[int]:
    """Return how many elements are left of axes that were found before."""
    first = [roles(model, axis)["produced"][0] for axis in axes]
    lengths = [latent_of(model, use.name)[1].shape[use.dim] for use in first]
    return [n * a.size // u.length for n, a, u in zip(lengths, axes, first, strict=True)]


def pruned(case: str, step: Step) -> tuple[nn.Module, Task]:
    make, data, _ = CASES[case]
    state = State(make(), data())
    run_step(step, state)
    return state.model, data()


# ------------------------------------------------------------------ masked and sliced


@each_case
def test_a_masked_network_computes_what_the_sliced_one_does(case: str) -> None:
    make, data, kind = CASES[case]
    task, step = data(), Prune(kind, keep=0.5, by=Random())  # type: ignore[arg-type]
    whole, masked = make(), make()
    axes = found(masked, task, kind)
    step._prune(State(masked, task, seed=derive(0, step.name, 0)), 1.0, axes)
    small, _ = pruned(case, step)
    shapes = [sorted(tensor.shape for tensor in model.parameters()) for model in (masked, whole)]
    assert shapes[0] == shapes[1]
    now, wanted = outputs(small, task), outputs(masked, task)
    assert torch.allclose(now, wanted, atol=CLOSE)
    assert float((wanted - outputs(whole, task)).abs().max()) > 100 * CLOSE
    assert laid_tensors(small) == {}
    used = sum(int((getattr(*owned) != 0).sum()) for owned in everything(masked))
    assert used <= sum(tensor.numel() for tensor in small.parameters()) < used * 1.01 + 2


def everything(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return every parameter as the network uses it, as its module and attribute."""
    names = {name for name, _ in model.named_parameters() if "parametrizations" not in name}
    split = [name.rpartition(".") for name in names | laid_tensors(model).keys()]
    return [(model.get_submodule(path), attribute) for path, _, attribute in split]


@each_case
def test_a_masked_network_stays_masked_while_it_trains(case: str) -> None:
    make, data, kind = CASES[case]
    state = State(make(), data())
    axes = found(state.model, state.task, kind)
    Prune(kind, keep=0.5)._prune(state, 1.0, axes)  # type: ignore[arg-type]
    gone = {axis: ~alive(state.model, axis) for axis in axes}
    run_step(Train(epochs=2, batch=8, optimizer=Adam(0.05)), state)
    for axis in axes:
        assert torch.equal(gone[axis], ~alive(state.model, axis))
        assert 0 < int(gone[axis].sum()) < axis.size
    before = outputs(state.model, state.task)
    run_step(Prune(kind, keep=1.0), state)  # type: ignore[arg-type]
    assert torch.allclose(outputs(state.model, state.task), before, atol=CLOSE)
    assert sizes(state.model, axes) == [int((~g).sum()) for g in gone.values()]


def test_pruning_leaves_the_network_in_its_mode_and_the_generator_alone() -> None:
    model, task = residual().train(), images()
    model.requires_grad_(False)
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    step = Prune("channels", keep=0.5, by=Taylor(batches=1))
    step.check(model, task)
    run_step(step, State(model, task))
    assert torch.equal(torch.rand(1), wanted)
    assert all(module.training for module in model.modules())
    assert not any(tensor.requires_grad for tensor in model.parameters())


def test_hidden_dimensions_and_a_tied_decoder_are_sliced_together() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForMaskedLM(bert().config).eval()
    decoder, words = model.cls.predictions.decoder, model.bert.embeddings.word_embeddings
    assert decoder.weight is words.weight
    labels = torch.arange(24) % WORDS
    data = (texts().train.inputs, labels[: len(texts().train)])
    task = Task(data, data, data, call=lambda network, batch: logits(network, batch)[:, 0])
    run_step(Prune("hidden", keep=0.75), State(model, task))
    assert decoder.weight is words.weight
    assert words.weight.shape == (WORDS, 18) and decoder.in_features == 18
    assert model.cls.predictions.transform.dense.weight.shape == (18, 18)
    assert model(torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 4, WORDS)


# ------------------------------------------------------------------ how many are left, and which


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    keep=st.floats(0.01, 1),
    over=st.sampled_from(["local", "global"]),
    multiple=st.integers(1, 6),
    seed=st.integers(0, 200),
)
def test_counts_are_exact_and_the_choice_does_not_change_when_repeated(
    lengths: list[int], keep: float, over: str, multiple: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> dict[int, Tensor]:
        return {
            place: torch.randint(3, (length,), generator=generator).float()
            for place, length in enumerate(lengths)
        }

    ranking = Ranking(over=over, multiple_of=multiple)  # type: ignore[arg-type]
    whole = {place: torch.ones(length, dtype=torch.bool) for place, length in enumerate(lengths)}
    scores = draw()
    kept = best_elements(scores, whole, keep, ranking)
    counts = [int(mask.sum()) for mask in kept.values()]
    assert all(n == length or n % multiple == 0 for n, length in zip(counts, lengths, strict=True))
    assert min(counts) >= 1
    least = sum(min(multiple, length) for length in lengths)
    if over == "local":
        assert counts == [ranking.count(length, keep) for length in lengths]
    elif multiple == 1:
        assert sum(counts) == max(round(keep * sum(lengths)), len(lengths))
    else:
        assert least <= sum(counts) <= max(round(keep * sum(lengths)), least)
    for place, mask in kept.items():
        order = sorted(range(lengths[place]), key=lambda i: (-float(scores[place][i]), i))
        assert mask.nonzero()[:, 0].tolist() == sorted(order[: counts[place]])
    again = best_elements(draw(), kept, keep, ranking)
    assert all(torch.equal(again[place], kept[place]) for place in kept)


def test_a_global_ranking_takes_the_best_anywhere_but_leaves_no_axis_empty() -> None:
    scores = {"a": torch.tensor([5.0, 4.0, 3.0, 2.0]), "b": torch.tensor([1.0, 0.5])}
    alive = {name: torch.ones(len(score), dtype=torch.bool) for name, score in scores.items()}
    kept = best_elements(scores, alive, 0.5, Ranking("global"))
    assert kept["a"].tolist() == [True, True, False, False]
    assert kept["b"].tolist() == [True, False]


def test_scores_that_are_nan_are_refused() -> None:
    with pytest.raises(ModelError, match="the scores of a hold NaN"):
        best_elements({"a": torch.tensor([float("nan")])}, {"a": torch.ones(1) > 0}, 1, Ranking())


def test_what_is_gone_fills_up_a_multiple_and_an_axis_is_never_empty() -> None:
    alive = torch.tensor([False, True, False, True, True, False])
    assert padded(alive, 1).tolist() == alive.tolist()
    assert padded(alive, 2).tolist() == [True, True, False, True, True, False]
    assert padded(torch.zeros(3, dtype=torch.bool), 1).tolist() == [True, False, False]


@each_case
def test_local_ranking_leaves_the_same_share_of_every_axis(case: str) -> None:
    make, data, kind = CASES[case]
    model, task = make(), data()
    axes = found(model, task, kind)
    for keep in (1.0, 0.3):
        small = copy.deepcopy(model)
        run_step(Prune(kind, keep=keep), State(small, task))  # type: ignore[arg-type]
        assert sizes(small, axes) == [round(axis.size * keep) for axis in axes]


def test_global_ranking_leaves_the_share_of_all() -> None:
    axes = found(plain(), images(), "channels")
    by = Magnitude("size")
    model, _ = pruned("vgg channels", Prune("channels", keep=0.4, by=by, ranking="global"))
    assert sum(sizes(model, axes)) == round(0.4 * 448)
    assert len({n / a.size for n, a in zip(sizes(model, axes), axes, strict=True)}) > 3


def test_channels_are_left_in_multiples() -> None:
    axes = found(plain(), images(), "channels")
    local, total = Ranking(multiple_of=8), Ranking("global", multiple_of=16)
    model, _ = pruned("vgg channels", Prune("channels", keep=0.7, ranking=local))
    assert sizes(model, axes) == [16, 16, 40, 40, 88, 88]
    model, _ = pruned("vgg channels", Prune("channels", keep=0.5, ranking=total))
    assert all(size % 16 == 0 for size in sizes(model, axes))
    assert sum(sizes(model, axes)) == 0.5 * 448


def test_the_smallest_filters_go() -> None:
    model = plain()
    norms = model.features[0].weight.detach().abs().sum((1, 2, 3))
    best = norms.argsort(descending=True)[:16].sort().values
    wanted = model.features[0].weight.detach()[best]
    small, _ = pruned("vgg channels", Prune("channels", keep=0.5))
    assert torch.equal(small.features[0].weight, wanted)


def test_network_slimming_cuts_the_smallest_scales_of_all_layers() -> None:
    model, task = plain(), images()
    norms = [module for module in model.features if isinstance(module, nn.BatchNorm2d)]
    scales = torch.cat([norm.weight.detach().abs() for norm in norms])
    least = scales.sort(descending=True).values[223]
    run_step(Prune("channels", keep=0.5, by=BatchNormScale(), ranking="global"), State(model, task))
    left = [
        module.weight.detach().abs()
        for module in model.features
        if isinstance(module, nn.BatchNorm2d)
    ]
    assert sum(map(len, left)) == 224
    assert all(float(scale.min()) >= float(least) for scale in left)


def test_only_what_the_scope_alone_computes_is_pruned(caplog: pytest.LogCaptureFixture) -> None:
    step = Prune("channels", scope="layer1.* kind:conv", keep=0.5)
    with caplog.at_level(logging.DEBUG, logger="laconic.structure.prune"):
        model, _ = pruned("resnet channels", step)
    assert model.layer1[0].conv1.out_channels == 8  # inside the block, free
    assert model.layer1[0].conv2.out_channels == 16  # of the residual stream, with others
    assert model.layer2[0].conv1.out_channels == 32
    summary, line = (message for message in caplog.messages if message.startswith("prune:"))
    assert summary == "prune: 8 of 16 channels are left (axes: 1)"
    assert line.startswith("prune: the channel axis of 16 in 'layer1.0.conv1.weight'")
    assert line.endswith(": 8 left")


# ------------------------------------------------------------------ rounds


class Look(Step):
    """Notes how many channels two layers have and use whenever it runs; stops where told."""

    def apply(self, state: State) -> None:
        layers = (state.model.first, state.model.last)
        used = [int((layer.weight.flatten(1) != 0).any(1).sum()) for layer in layers]
        SEEN.append([*zip((layer.out_channels for layer in layers), used, strict=True)])
        state.training = {}
        if len(SEEN) == STOP[0]:
            raise KeyboardInterrupt


Step._registry[Step].pop("look")  # other tests walk over the registry: it stays laconic's
SEEN: list[list[tuple[int, int]]] = []
STOP = [0]


@pytest.fixture
def look() -> Look:
    SEEN.clear()
    STOP[0] = 0
    return Look()


def test_rounds_mask_and_the_last_one_slices_before_it_retrains(look: Look) -> None:
    step = Prune("channels", keep=0.25, rounds=3, schedule=Geometric(), retrain=look)
    pruned("separable channels", step)
    shares = [0.25 ** (index / 3) for index in (1, 2, 3)]
    assert SEEN[:2] == [[(6, round(6 * s)), (4, round(4 * s))] for s in shares[:2]]
    assert SEEN[2] == [(2, 2), (1, 1)]


@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_a_round_goes_on_where_its_training_was_stopped(look: Look, stopped: int) -> None:
    step = Prune("channels", keep=0.25, rounds=3, by=Random(), retrain=look)
    whole, _ = pruned("separable channels", step)
    seen = list(SEEN)
    SEEN.clear()
    STOP[0] = stopped
    state = State(Separable(), images())
    with pytest.raises(KeyboardInterrupt):
        run_step(step, state)
    # What a checkpoint says that was written inside that training.
    state = State(state.model, state.task, saved=[stopped - 1], training={"counters": {}})
    SEEN.clear()
    STOP[0] = 0
    run_step(step, state)
    assert seen[stopped - 1 :] == SEEN
    wanted = dict(whole.named_parameters())
    assert all(torch.equal(tensor, wanted[n]) for n, tensor in state.model.named_parameters())


# ------------------------------------------------------------------ while training


def test_gradual_pruning_masks_and_a_second_step_slices() -> None:
    state = State(Separable(), images())
    axes = found(state.model, state.task, "channels")
    step = Prune("channels", keep=0.5, rounds=4)
    left = []

    class Spy(Step):
        def apply(self, state: State) -> None:
            for update in range(1, 9):
                step.update(state, update / 8, since=(update - 1) / 8)
                left.append(int(alive(state.model, axes[0]).sum()))

    Step._registry[Step].pop("spy")
    run_step(Spy(), state)
    shares = [step.schedule.keep(index / 4, 0.5) for index in range(5)]
    assert left == [round(6 * shares[update // 2]) for update in range(1, 9)]
    assert sizes(state.model, axes) == [6, 4]
    run_step(Train(batch=8, during=(step,)), state)
    before = outputs(state.model, state.task)
    run_step(Prune("channels", keep=1), state)
    assert sizes(state.model, axes) == [3, 2]
    assert torch.allclose(outputs(state.model, state.task), before, atol=CLOSE)


@pytest.mark.parametrize("axes", ["weights", "channels"])
def test_an_update_without_anything_to_do_looks_at_no_weight(
    axes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("weights_of", "alive", "axes_of"):
        real = getattr(prune, name)
        monkeypatch.setattr(
            prune, name, lambda *args, real=real, name=name: (calls.append(name), real(*args))[1]
        )
    state, step = State(Separable(), images()), Prune(axes, keep=0.5, rounds=3)  # type: ignore[arg-type]
    for update in range(1, 31):
        step.update(state, update / 30, since=(update - 1) / 30)
    assert calls.count("weights_of") == (3 if axes == "weights" else 0)
    assert calls.count("axes_of") == (1 if axes == "channels" else 0)
    assert calls.count("alive") == (3 * 2 if axes == "channels" else 0)


def test_a_step_serves_one_training_after_another() -> None:
    state, step = State(Separable(), images()), Prune("weights", keep=0.5, rounds=2)
    for update in range(1, 11):
        step.update(state, update / 10, since=(update - 1) / 10)
    bake(state.model)
    again = Prune("weights", keep=0.5, rounds=2)
    for update in range(1, 11):
        again.update(state, update / 10, since=(update - 1) / 10)
    assert int((state.model.inner.weight != 0).sum()) == 18
    assert int(mask_of(state.model, "inner.weight").sum()) == 18  # type: ignore[union-attr]


# ------------------------------------------------------------------ soft filter pruning


@pytest.mark.parametrize("axes", ["weights", "channels"])
def test_soft_pruning_zeroes_at_its_moments_and_masks_at_the_end(axes: str) -> None:
    state = State(Separable(), images())
    step = Prune(axes, keep=0.5, schedule=Soft(), rounds=3)  # type: ignore[arg-type]
    kernel = state.model.first.weight
    zeros = []
    for update in range(1, 10):
        with torch.no_grad():
            kernel.copy_(torch.rand(kernel.shape))  # training moves what was zeroed, too
        step.update(state, update / 9, since=(update - 1) / 9)
        zeros.append(int((state.model.first.weight.flatten(1) == 0).sum()))
    half = kernel.numel() // 2
    assert zeros == [0, 0, half, 0, 0, half, 0, 0, half]
    assert "first.weight" in laid_tensors(state.model)
    assert int(mask_of(state.model, "first.weight").sum()) == half  # type: ignore[union-attr]


def test_what_was_softly_pruned_learns_again_and_may_come_back() -> None:
    state = State(Separable(), images())
    step = Prune("channels", scope="first, each", keep=0.5, schedule=Soft(), rounds=4)
    step.update(state, 0.2, since=0.0)
    step.update(state, 0.25, since=0.2)
    zeroed = (state.model.first.weight.flatten(1) == 0).all(1)
    assert int(zeroed.sum()) == 3
    run_step(Train(batch=8, optimizer=Adam(0.01, decay=Constant())), state)
    assert bool((state.model.first.weight.flatten(1)[zeroed] != 0).any(1).all())
    with torch.no_grad():
        state.model.first.weight[zeroed] = 9.0
    step.update(state, 0.5, since=0.25)
    assert bool((state.model.first.weight[zeroed] == 9.0).all())


# ------------------------------------------------------------------ with representations and masks


def test_channels_of_a_network_with_masks_and_codes_are_sliced() -> None:
    model, task = plain(), images()
    run_step(Prune("weights", keep=0.5), State(model, task))
    lay(model, "classifier.weight", KMeans(2))
    kept = int((model.features[3].weight != 0).sum())
    axes = found(model, task, "channels")
    run_step(Prune("channels", keep=0.5), State(model, task))
    assert sizes(model, axes) == [axis.size // 2 for axis in axes]
    assert 0 < int((model.features[3].weight != 0).sum()) < kept
    layer, latent = laid_tensors(model)["classifier.weight"]
    assert layer.representation == KMeans(2) and latent.shape == (3, 64)
    assert bool(outputs(model, task).isfinite().all())


def test_channels_that_single_weights_cut_off_go_first() -> None:
    model, task = Separable(), images()
    dead = [1, 2, 4]
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[:, dead] = False
    lay(model, "outer.weight", Float(), mask=mask)
    before = outputs(model, task)
    wanted = model.inner.weight.detach()[[i for i in range(9) if i not in dead]]
    run_step(Prune("neurons", keep=1), State(model, task))
    assert torch.equal(model.inner.weight, wanted)
    assert laid_tensors(model) == {}
    assert torch.allclose(outputs(model, task), before, atol=CLOSE)


# ------------------------------------------------------------------ what is refused


def refused(step: Step, model: nn.Module, task: Task | None) -> str:
    """Return why a step is refused before any work, and refuses to work."""
    with pytest.raises(LaconicError) as checked:
        step.check(model, task)
    with pytest.raises(LaconicError) as applied:
        run_step(step, State(model, task))
    assert type(checked.value) is type(applied.value)
    return f"{type(checked.value).__name__}: {checked.value}"


def test_a_kind_of_axis_that_is_not_there_is_refused() -> None:
    assert refused(Prune("heads", keep=0.5), Separable(), images()) == (
        "AxisError: the network has no heads; prunable here: channels, neurons"
    )


def test_axes_that_are_all_frozen_are_refused_with_the_reasons() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2))
    task = images()
    task.call = lambda model, batch: model(batch.inputs[0]).mean(2)
    found = refused(Prune("channels", keep=0.5), model, task)
    assert found.startswith("AxisError: channels cannot be pruned in '*': ")
    assert "the channel axis of 4 in '0.weight' and 1 more is frozen (an output)" in found


def test_a_scope_that_computes_no_axis_alone_is_refused() -> None:
    found = refused(Prune("channels", scope="first", keep=0.5), Separable(), images())
    assert found == (
        "AxisError: no channels are computed by modules of 'first' alone; widen it: the channel "
        "axis of 6 in 'first.weight' and 6 more is computed by 'each' too"
    )
    found = refused(Prune("channels", scope="inner", keep=0.5), Separable(), images())
    assert found == (
        "AxisError: no channels are computed by modules of 'inner'; those of this network are "
        "computed by 'each', 'first', 'last'"
    )


def test_a_share_that_rounds_to_none_is_refused_before_any_work() -> None:
    step = Prune("neurons", keep=0.05)
    with pytest.raises(AxisError, match=r"keep 0\.05 of the neuron axis of 9 .* more than 0\.0555"):
        step.check(Separable(), images())
    Prune("neurons", keep=0.05, ranking="global").check(Separable(), images())


def test_axes_are_not_found_without_a_task() -> None:
    found = refused(Prune("channels", keep=0.5), Separable(), None)
    assert found == "TaskError: the axes of a network are found on a batch of data; give task="


def test_a_forward_that_fails_is_refused() -> None:
    found = refused(Prune("channels", keep=0.5), residual(), images(channels=1))
    assert found.startswith("ModelError: ResNet fails on 2 examples of task (RuntimeError: ")


def test_a_task_that_calls_parts_of_the_network_is_refused() -> None:
    task = images()
    task.call = lambda model, batch: model.outer(model.inner(batch.inputs[0].mean((2, 3))[:, :1]))
    task.call = lambda model, batch: model.first(batch.inputs[0]).mean((2, 3))[:, :3]
    found = refused(Prune("channels", keep=0.5), Separable(), task)
    assert found.startswith("TaskError: task: call= does not call the model but parts of it")


@pytest.mark.parametrize(
    ("axes", "by", "message"),
    [
        ("weights", HeadImportance(), "head_importance ranks heads, not weights"),
        ("channels", HeadImportance(), "head_importance ranks heads, not channels"),
        ("heads", NeuronImportance(), "neuron_importance ranks neurons, not heads"),
        ("channels", OBS(), "obs ranks weights, not channels"),
        ("heads", BatchNormScale(), "batch_norm_scale ranks channels, not heads"),
        ("weights", FPGM(), "fpgm ranks channels, neurons, not weights"),
    ],
)
def test_a_criterion_that_cannot_rank_these_is_refused(
    axes: str, by: Criterion, message: str
) -> None:
    with pytest.raises(RecipeError, match=f"{message}; choose one of: .*taylor"):
        Prune(axes, keep=0.5, by=by).check(Separable(), images())  # type: ignore[arg-type]


def test_channels_without_a_norm_are_refused_by_its_scale() -> None:
    step = Prune("channels", keep=0.5, by=BatchNormScale(), ranking="global")
    found = refused(step, Separable(), images())
    assert "has no BatchNorm, so no scale to rank by" in found and "'first.weight'" in found
    step.check(plain(), images())


def test_multiples_of_single_weights_are_refused() -> None:
    with pytest.raises(RecipeError, match="multiples are of channels"):
        Prune("weights", keep=0.5, ranking=Ranking(multiple_of=4)).check(Separable(), None)


# ------------------------------------------------------------------ rewiring


@pytest.mark.parametrize(
    ("case", "by"),
    [
        ("bert heads", HeadImportance(batches=2, batch=8)),
        ("bert neurons", NeuronImportance(batches=2, batch=8)),
        ("separable channels", Random()),
    ],
)
def test_rewiring_sorts_by_score_and_computes_the_same(case: str, by: Criterion) -> None:
    make, data, kind = CASES[case]
    model, task, step = make(), data(), Rewire(kind, by=by)  # type: ignore[arg-type]
    step.check(model, task)
    seed = derive(0, step.name, 0)
    axes = found(model, task, kind)
    scores = by.axis_scores(State(model, task, seed=seed), axes)
    before = outputs(model, task)
    weight = {axis: roles(model, axis)["produced"][0] for axis in axes}
    norms = {axis: size_of(model, use) for axis, use in weight.items()}
    run_step(step, State(model, task))
    assert torch.allclose(outputs(model, task), before, atol=CLOSE)
    orders = {axis: scores[axis].argsort(descending=True, stable=True) for axis in axes}
    for axis, use in weight.items():
        assert torch.allclose(size_of(model, use), norms[axis][orders[axis]])
    assert any(order.tolist() != sorted(order.tolist()) for order in orders.values())


def size_of(model: nn.Module, use: Use) -> Tensor:
    return use.rows(latent_of(model, use.name)[1].detach()).abs().sum(1)


def test_rewiring_of_what_is_not_there_is_refused() -> None:
    assert "the network has no heads" in refused(Rewire("heads"), Separable(), images())


# ------------------------------------------------------------------ example inputs


def test_example_inputs_are_what_the_model_is_called_with() -> None:
    task = texts()
    torch.manual_seed(7)
    wanted = torch.rand(1)
    torch.manual_seed(7)
    inputs, named = example_inputs(bert(), task, count=3)
    assert inputs == () and named.keys() == {"input_ids", "attention_mask"}
    assert torch.equal(named["input_ids"], task.train.inputs[task.train.index[:3]])
    assert not torch.equal(torch.rand(1), wanted)  # bert() draws
    model = Separable().train()
    torch.manual_seed(7)
    (found,), _ = example_inputs(model, images())
    assert torch.equal(torch.rand(1), wanted)
    assert found.shape == (2, 3, 8, 8) and model.training
    assert not model._forward_pre_hooks
