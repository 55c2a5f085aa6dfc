"""Prune on axes: masked and sliced networks, representations and masks, examples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.prune_axes import (
    CASES,
    CLOSE,
    WORDS,
    Separable,
    bert,
    each_case,
    found,
    images,
    logits,
    outputs,
    plain,
    pruned,
    residual,
    sizes,
    texts,
)
from laconic.recover import Adam, Train
from laconic.step import State, derive, run_step
from laconic.structure import Prune, Random, Taylor
from laconic.structure.elements import alive
from laconic.structure.examples import example_inputs
from laconic.tasks import Task
from laconic.weights import Float, KMeans, lay
from laconic.weights.laid import laid_tensors

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
