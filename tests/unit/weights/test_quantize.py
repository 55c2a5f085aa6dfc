"""Activations in networks: where they are rounded, calibration, files, checkpoints, bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic import Attention, Hidden, Logits, load, save
from laconic.errors import ArtifactError, ModelError, RecipeError, ScopeError, TaskError
from laconic.measure import measure
from laconic.models import digits_cnn
from laconic.models.capture import capture
from laconic.recipe import Recipe
from laconic.recover import Recalibrate, Reset, Train
from laconic.recover.lesson import Lesson
from laconic.report.tables import heading, layer_columns
from laconic.run import compress
from laconic.ship.checkpoint import load_checkpoint, save_checkpoint
from laconic.ship.container import read, write
from laconic.step import State, run_step
from laconic.structure import Ghost, Split, TokenGhosts, find_axes
from laconic.structure.surgery import replace_
from laconic.tasks import Task
from laconic.weights import (
    Float,
    LearnedClip,
    LearnedSpacing,
    LeastError,
    MinMax,
    MovingAverage,
    Percentile,
    Quantize,
    Quantizer,
    Ternary,
    activations_of,
    attach_,
)
from laconic.weights.laid import laid_tensors
from laconic.weights.lookup import looked_up
from laconic.weights.quantizer import calibrate, quantizing

pytest.importorskip("transformers", reason="the extra hf is not installed")

# Of the attention that can be rounded against torch's own, in float32.
CLOSE = 1e-6
BODY = "*, !*position*, !*token_type*, !classifier"


def bert(kind: str = "bert") -> nn.Module:
    """Return a tiny encoder of random weights."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "num_labels": 2}
    if kind == "distilbert":
        sizes |= {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 4}
    else:
        sizes |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "embedding_size": 8}
    config = AutoConfig.for_model(kind, **sizes)
    model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    return model.eval()


def texts() -> dict[str, Tensor]:
    """Return token ids of which some are padding."""
    ids = torch.randint(5, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    mask[2, 2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: nn.Module) -> Tensor:
    """Return what a network says of the texts."""
    with torch.no_grad():
        found: Tensor = model(**texts()).logits
    return found


def quantized(step: Quantize, model: nn.Module, task: Task | None = None) -> nn.Module:
    """Return a copy that a step has quantised."""
    state = State(copy.deepcopy(model), task)
    step.check(state.model, task)
    run_step(step, state)
    return state.model


def images() -> Task:
    """Return a few random digits."""
    generator = torch.Generator().manual_seed(0)
    pair = (torch.rand(64, 1, 8, 8, generator=generator), torch.arange(64) % 10)
    return Task(pair, pair, pair)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "albert", "electra"])
def test_the_attention_that_rounds_is_eager_attention(kind: str) -> None:
    model = bert(kind)
    rounding = quantized(Quantize(activation=8), model)
    places = [set(found) for found in activations_of(rounding).values()]
    assert {"query", "key", "probabilities", "value"} in places and {"input"} in places
    with quantizing(rounding, "pass"):
        torch.testing.assert_close(logits(rounding), logits(model), rtol=0, atol=CLOSE)
    assert not torch.equal(logits(rounding), logits(model))
    torch.testing.assert_close(logits(rounding), logits(model), rtol=0, atol=0.05)


def test_what_a_scope_leaves_out_stays_float() -> None:
    model = quantized(
        Quantize(Ternary(), embedding=Ternary("row"), activation=8, scope=BODY), bert()
    )
    from laconic.weights.laid import laid_tensors

    laid = {name: layer.representation for name, (layer, _) in laid_tensors(model).items()}
    assert laid.pop("bert.embeddings.word_embeddings.weight") == Ternary("row")
    assert len(laid) == 2 * 6 + 1 and set(laid.values()) == {Ternary()}
    rounds = activations_of(model)
    assert not any("classifier" in path or "embeddings" in path for path in rounds)
    assert len(rounds) == 2 * 7 + 1


def test_operands_are_left_alone_where_asked() -> None:
    model = quantized(Quantize(activation=8, operands=False), bert())
    assert {place for places in activations_of(model).values() for place in places} == {"input"}


def test_probabilities_may_be_rounded_otherwise() -> None:
    even, uneven = MinMax(4, levels="symmetric"), MinMax(4)
    model = quantized(Quantize(activation=even, probabilities=uneven), bert())
    attention = activations_of(model)["bert.encoder.layer.0.attention.self"]
    assert attention == {
        **dict.fromkeys(("query", "key", "value"), even),
        "probabilities": uneven,
    }
    alone = activations_of(quantized(Quantize(probabilities=uneven), bert()))
    assert [*alone.values()] == [{"probabilities": uneven}] * 2
    with pytest.raises(RecipeError, match="probabilities are operands"):
        Quantize(activation=8, operands=False, probabilities=4)
    with pytest.raises(ScopeError, match="'classifier' selects no attention"):
        Quantize(probabilities=4, scope="classifier").check(bert(), None)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Quantize(8, embedding=8, scope="*.encoder.*"), "selects no embedding"),
        (
            Quantize(8, embedding=8, scope="*.word_embeddings"),
            "selects no weight of two or more dimensions beside those of embeddings",
        ),
    ],
)
def test_a_field_that_selects_nothing_is_refused(step: Quantize, words: str) -> None:
    with pytest.raises(ScopeError, match=words):
        step.check(bert(), None)


def test_what_an_earlier_step_quantises_is_said(caplog: pytest.LogCaptureFixture) -> None:
    step, first = Quantize(8, scope="*.word_embeddings, classifier"), Quantize(Ternary())
    step.check(bert(), None, (Quantize(Ternary(), scope="*embeddings"),))
    told = "'bert.embeddings.word_embeddings.weight': quantised before (ternary)"
    assert told in caplog.text and "classifier" not in caplog.text
    caplog.clear()
    step.check(bert(), None, (first, Quantize(Float())))
    assert not caplog.text


def test_a_network_that_came_quantised_is_refused_until_it_is_floats() -> None:
    model = quantized(Quantize(Ternary(), scope="*.query, *.word_embeddings"), bert())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told = "'bert.embeddings.word_embeddings.weight': quantised already .ternary. in the network"
    with pytest.raises(ModelError, match=told):
        compress(model, None, [Quantize(8, scope="*.word_embeddings, classifier")])
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    Quantize(8, scope="classifier").check(model, None)
    Quantize(activation=8).check(model, None)
    small = compress(model, None, [Quantize("float"), Quantize(8)]).model
    kinds = {layer.representation.name for layer, _ in laid_tensors(small).values()}
    assert kinds == {"symmetric"}


def test_floats_everywhere_change_nothing() -> None:
    model = bert()
    assert torch.equal(logits(quantized(Quantize(Float()), model)), logits(model))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_floats_everywhere_have_nothing_to_learn_from_their_teacher(precision: str) -> None:
    """All that TernaryBERT compares is the same, decoded once for the forward or not."""
    model, ids = bert(), texts()["input_ids"]

    def call(network: Any, batch: Any) -> Tensor:
        found: Tensor = network(input_ids=batch.inputs[0]).logits
        return found

    task = Task((ids, torch.arange(3) % 2), (ids, torch.arange(3) % 2), call=call)
    state = State(quantized(Quantize(Float()), model), task, teacher=(model,), precision=precision)
    batch = task.example_batch(3)
    for objective in (Hidden(), Attention(), Logits(loss="l2")):
        lesson = Lesson(objective, state, task)
        with parametrize.cached(), looked_up(state.model):
            assert lesson.loss(batch, lesson.teach(batch, 0), 0.0).item() == 0


def test_scores_are_of_the_rounded_operands() -> None:
    model = quantized(Quantize(activation=2, scope="*.self"), bert())
    attention = model.get_submodule("bert.encoder.layer.0.attention.self")
    with capture(model, ["attention.1", "query.1", "key.1"]) as features:
        logits(model)
    query, key = (attention.quantizers[n](features[f"{n}.1"]) for n in ("query", "key"))
    scores = query @ key.transpose(-1, -2) * attention.scaling
    torch.testing.assert_close(features["attention.1"], scores)


@pytest.mark.parametrize("activation", [Percentile(), LeastError()])
def test_ranges_are_searched_in_every_channel(activation: Any) -> None:
    small = torch.randn(32, 64, 768, generator=torch.Generator().manual_seed(0))
    small[..., ::24] *= 0.1  # what every so many numbers would come upon
    assert float(activation.limits(small)[1]) > 2.0


@pytest.mark.parametrize("activation", [MinMax(8), LearnedClip(4), LearnedSpacing(4), Percentile()])
def test_a_file_computes_the_same_bit_for_bit(activation: Any, tmp_path: Path) -> None:
    task = images()
    model = quantized(Quantize(Ternary(), activation=activation), digits_cnn(), task)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    save(model, tmp_path / "model.safetensors", task=task)
    loaded = load(tmp_path / "model.safetensors")
    assert activations_of(loaded) == activations_of(model)
    batch = task.example_batch(16)
    with torch.no_grad():
        assert torch.equal(task.call(loaded, batch), task.call(model.eval(), batch))


def test_a_file_of_an_encoder_rounds_its_operands_too(tmp_path: Path) -> None:
    model = quantized(Quantize(Ternary(), activation=8, scope=BODY), bert())
    save(model, tmp_path / "model.safetensors")
    assert torch.equal(logits(load(tmp_path / "model.safetensors")), logits(model))
    again = load(tmp_path / "model.safetensors", model=bert())
    assert torch.equal(logits(again), logits(model))


def test_a_copy_rounds_by_itself() -> None:
    model = quantized(Quantize(activation=LearnedClip(4)), digits_cnn())
    twin = copy.deepcopy(model)
    before = twin(torch.ones(1, 1, 8, 8))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Quantizer):
                module.high.mul_(0.01)
    assert torch.equal(twin(torch.ones(1, 1, 8, 8)), before)
    assert not torch.equal(model(torch.ones(1, 1, 8, 8)), before)


def test_a_checkpoint_brings_the_ranges_back(tmp_path: Path) -> None:
    task = images()
    state = State(digits_cnn(), task)
    plain = copy.deepcopy(state.model)
    run_step(Quantize(8, activation=MovingAverage()), state)
    save_checkpoint(state, {}, tmp_path / "checkpoint", run={})
    again = State(plain, task)
    load_checkpoint(again, tmp_path / "checkpoint")
    assert activations_of(again.model) == activations_of(state.model)
    kept = again.model.state_dict()
    assert kept.keys() == state.model.state_dict().keys()
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, kept[name]), name


def test_training_moves_learned_ranges_and_follows_averages() -> None:
    task = images()
    for activation in (LearnedClip(4), LearnedSpacing(4), MovingAverage(decay=0.5)):
        state = State(digits_cnn(), task)
        run_step(Quantize(activation=activation), state)
        before = {n: t.clone() for n, t in state.model.state_dict().items() if "quantizers" in n}
        run_step(Train(batch=16), state)
        moved = [n for n, t in before.items() if not torch.equal(t, state.model.state_dict()[n])]
        assert len(moved) >= 4, activation  # below a ReLU no number is low enough to move one


def test_a_reset_begins_again_with_ranges_too() -> None:
    task = images()
    for activation in (LearnedClip(4), LearnedSpacing(4), MovingAverage()):
        state = State(digits_cnn(), task)
        run_step(Quantize(activation=activation), state)
        first = {n: t.clone() for n, t in state.model.state_dict().items() if "conv1.quan" in n}
        with torch.no_grad():
            for name in first:
                state.model.state_dict()[name].fill_(0.5)
        run_step(Reset(), state)
        after = state.model.state_dict()
        for name, tensor in first.items():  # what flows into the first layer is the same
            torch.testing.assert_close(after[name], tensor, rtol=0.1, atol=0.01)
        run_step(Train(batch=16), state)


def test_recalibration_finds_static_ranges_anew_and_keeps_learned_ones() -> None:
    task = images()
    for activation, changes in ((Percentile(share=0.9), True), (LearnedClip(4), False)):
        state = State(digits_cnn(), task)
        run_step(Quantize(activation=activation), state)
        with torch.no_grad():
            for module in state.model.modules():
                if isinstance(module, Quantizer):
                    module.high.fill_(0.5)
        run_step(Recalibrate(2, batch=16), state)
        highs = [m.high.item() for m in state.model.modules() if isinstance(m, Quantizer)]
        assert all((high != 0.5) == changes for high in highs)


@pytest.mark.parametrize("scope", ["fc1", "kind:linear, !fc2"])
def test_a_scope_of_layers_has_their_ranges(scope: str) -> None:
    for activation in (LearnedClip(4), MovingAverage(decay=0.5)):
        state = State(digits_cnn(), images())
        run_step(Quantize(activation=activation), state)
        before = {n: t.clone() for n, t in state.model.state_dict().items() if "quantizers" in n}
        run_step(Train(batch=16, scope=scope), state)
        after = state.model.state_dict()
        moved = {name.partition(".")[0] for name, t in before.items() if not t.equal(after[name])}
        assert moved == {"fc1"}
        run_step(Recalibrate(1, batch=16, scope=scope), state)


def test_axes_are_found_behind_what_rounds() -> None:
    model = bert()
    rounding = quantized(Quantize(Ternary(), activation=8, scope=BODY), model)
    kinds = [(axis.kind, axis.size, axis.frozen) for axis in find_axes(model, **texts())]
    assert [(a.kind, a.size, a.frozen) for a in find_axes(rounding, **texts())] == kinds


def test_what_takes_a_layers_place_rounds_its_input() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    attach_(model, {"0": {"input": MinMax(2)}})
    replace_(model, "0", nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4)))
    assert activations_of(model) == {"0.0": {"input": MinMax(2)}}


def test_ids_are_never_rounded() -> None:
    state = State(bert())
    run_step(Quantize(embedding=Ternary("row"), scope="*word_embeddings"), state)
    run_step(Split(), state)
    run_step(Quantize(activation=8, scope=BODY), state)
    assert not any("embeddings" in path for path in activations_of(state.model))


def test_a_layer_inside_what_takes_its_place_rounds_once() -> None:
    state = State(bert())
    run_step(Quantize(activation=8, operands=False), state)
    before = len(activations_of(state.model))
    run_step(Ghost(TokenGhosts()), state)
    assert len(activations_of(state.model)) == before


def test_another_scope_does_not_move_ranges_that_were_learned() -> None:
    state = State(digits_cnn(), images())
    run_step(Quantize(activation=MovingAverage(), scope="conv1"), state)
    first = state.model.conv1.quantizers["input"]
    first.high.fill_(7.0)
    run_step(Quantize(activation=MovingAverage(), scope="fc1"), state)
    assert state.model.conv1.quantizers["input"] is first and first.high == 7.0
    assert state.model.fc1.quantizers["input"].seen > 0


def test_an_objective_of_scores_does_not_move_a_range_twice() -> None:
    model = bert()
    attach_(model, {"bert.encoder.layer.0.attention.self": {"query": MovingAverage(decay=0.5)}})
    with capture(model.train(), ["attention.1"]):
        model(**texts())
    assert model.bert.encoder.layer[0].attention.self.quantizers["query"].seen == 1


def test_a_layer_that_is_never_called_is_refused() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with pytest.raises(ModelError, match=r"computes with the weight.*'!0.self_attn.out_proj'"):
        Quantize(activation=8).check(model, None)
    Quantize(activation=8, scope="*, !*.out_proj").check(model, None)


def test_inputs_may_be_given_by_name() -> None:
    layer = nn.Linear(1, 1, bias=False)
    attach_(layer, {"": {"input": MinMax(2)}})
    assert layer(input=torch.tensor([[0.1], [1.0]])).tolist()[0] == [0.0]


def test_a_run_quantises_trains_and_ships(tmp_path: Path) -> None:
    task = images()
    recipe = Recipe((Quantize(Ternary(), activation=LearnedSpacing(4)), Train(batch=16)))
    result = compress(digits_cnn(), task, recipe, out=tmp_path / "run")
    loaded = load(tmp_path / "run" / "model.safetensors")
    batch = task.example_batch(16)
    with torch.no_grad():
        assert torch.equal(task.call(loaded, batch), task.call(result.model, batch))


def test_padded_batches_of_torchs_encoder_are_not_packed() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    attach_(model, {"layers.0.linear1": {"input": MinMax(4)}})
    padding = torch.tensor([[False] * 5, [False, False, True, True, True]])
    inputs = torch.randn(2, 5, 8)
    expected = model(inputs, src_key_padding_mask=padding)
    with torch.no_grad():
        found = model(inputs, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding])


# ---------------------------------------------------------------------------- bad input


def test_nothing_to_quantise_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing is quantised"):
        Quantize()
    with pytest.raises(ScopeError, match="no weight of two or more dimensions"):
        Quantize(4, scope="kind:norm").check(bert(), None)
    with pytest.raises(ScopeError, match="no linear layer, convolution or attention"):
        Quantize(activation=4, scope="kind:norm").check(bert(), None)


def test_ranges_without_data_are_refused() -> None:
    with pytest.raises(TaskError, match="needs data for the range of Percentile"):
        Quantize(activation=Percentile()).check(digits_cnn(), None)
    model = quantized(Quantize(activation=Percentile()), digits_cnn(), images())
    with pytest.raises(TaskError, match="no examples to calibrate"):
        calibrate(model, images(), [], [m for m in model.modules() if isinstance(m, Quantizer)])


@pytest.mark.parametrize("activation", [MovingAverage(), Percentile(), LearnedSpacing()])
def test_ranges_of_a_broken_network_are_refused(activation: Any) -> None:
    model = digits_cnn()
    with torch.no_grad():
        model.conv1.weight[0] = torch.nan
    with pytest.raises(ModelError, match=r"'conv2.quantizers.input' was fed .* not finite"):
        quantized(Quantize(activation=activation), model, images())


def test_places_that_are_not_there_are_refused() -> None:
    with pytest.raises(ModelError, match=r"no module 'fc9'.*did you mean"):
        attach_(nn.ModuleDict({"fc1": nn.Linear(1, 1)}), {"fc9": {"input": MinMax()}})
    with pytest.raises(ModelError, match="has no 'query' to round"):
        attach_(nn.Sequential(nn.Linear(1, 1)), {"0": {"query": MinMax()}})


def test_attention_that_cannot_be_exchanged_is_refused() -> None:
    model = bert()
    model._can_set_attn_implementation = lambda: False
    with pytest.raises(ModelError, match=r"cannot be exchanged.*\(operands: false\)"):
        Quantize(activation=8).check(model, None)
    Quantize(activation=8, operands=False).check(model, None)
    with pytest.raises(ModelError, match="cannot be exchanged"):
        attach_(model, {"bert.encoder.layer.0.attention.self": {"query": MinMax()}})


def test_a_hostile_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(quantized(Quantize(activation=8), digits_cnn()), path)
    manifest, blobs = read(path)
    (place, *_) = manifest["activations"]
    for activations in (
        {"nowhere": {"input": "min_max"}},
        {place: {"query": "min_max"}},
        {place: {"input": {"min_max": {"bits": 64}}}},
        {place: {"input": "os.system"}},
        {place: {"input": {"learned_clip": {"bits": 8}}}},
        {place: "min_max"},
        [],
        None,
    ):
        write(path, manifest | {"activations": activations}, blobs)
        with pytest.raises(ArtifactError):
            load(path)
    write(path, {k: v for k, v in manifest.items() if k != "activations"}, blobs)
    assert activations_of(load(path)) == {}


def test_a_network_that_rounds_otherwise_is_no_plain_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(quantized(Quantize(activation=8), digits_cnn()), path)
    other = quantized(Quantize(activation=4), digits_cnn())
    with pytest.raises(ArtifactError, match="rounds its activations otherwise"):
        load(path, model=other)


def test_an_ordinary_folder_cannot_round(tmp_path: Path) -> None:
    from laconic.models import save_pretrained

    with pytest.raises(ModelError, match="rounds what flows into it"):
        save_pretrained(quantized(Quantize(activation=8), bert()), tmp_path / "folder")


def test_operations_count_the_bits_of_both_sides() -> None:
    task = images()
    found = measure(quantized(Quantize(Ternary(), activation=8), digits_cnn()), task, latency=False)
    assert {layer.input_bits for layer in found.layers} == {8}
    assert found.bit_operations == found.macs * 2 * 8
    columns = {heading(column) for column in layer_columns([found, found])}
    assert "Bits of inputs" in columns
