"""Surgery: what an edit changes, what is recorded of it, and that the record rebuilds it."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict

import pytest
import torch
from torch import nn

from laconic.errors import ModelError
from laconic.models import digits_cnn
from laconic.models.layers import LARGEST
from laconic.structure.surgery import (
    apply_edits_,
    edits_of,
    keep_,
    replace_,
    resize_,
    set_attributes_,
)
from laconic.weights import Ternary, bake, lay


class Block(nn.Module):
    """A linear layer with a norm and a list in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.inner = nn.ModuleList([nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 6)])

    def forward(self, x):
        x = self.norm(self.linear(x))
        for module in self.inner:
            x = module(x)
        return x


class Net(nn.Module):
    """Blocks in a list, an activation that stands in two places, a tied decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.first = self.last = nn.ReLU()
        self.head = nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(6), act=self.first))
        self.decoder = nn.Linear(6, 9, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.first(self.embedding(tokens))
        for block in self.blocks:
            x = block(x)
        return self.decoder(self.head(self.last(x)))


TOKENS = torch.arange(8) % 9


@pytest.fixture
def net():
    return Net().eval()


def rebuilt(model: nn.Module, plain: nn.Module) -> nn.Module:
    """Return a plain network with the edits of another, read from JSON, and its numbers."""
    edits = json.loads(json.dumps(edits_of(model)))
    state = model.state_dict()
    shapes = {name: list(state[name].shape) for name in edits.get("shapes", ())}
    apply_edits_(plain, edits, shapes)
    assert edits_of(plain) == edits_of(model)
    plain.load_state_dict(state)
    return plain


def same(model: nn.Module, tokens: torch.Tensor = TOKENS) -> None:
    """Demand that the record of a network makes a plain one compute the same."""
    again = rebuilt(model, Net().eval())
    assert torch.equal(again(tokens), model(tokens))
    with torch.device("meta"):
        empty = Net()
    state = model.state_dict()
    shapes = {name: state[name].shape for name in edits_of(model).get("shapes", ())}
    apply_edits_(empty, edits_of(model), shapes)
    assert {name: t.shape for name, t in empty.state_dict().items()} == {
        name: t.shape for name, t in state.items()
    }


def test_an_unedited_network_has_no_edits(net):
    assert edits_of(net) == {}
    net.laconic = {"builder": {"custom": "a:b"}}
    assert edits_of(net) == {}


def test_the_first_edit_notes_the_builder(net):
    keep_(net, "blocks", [0])
    assert net.laconic["builder"]["custom"].endswith("test_surgery:Net")
    model = digits_cnn()
    builder = copy.deepcopy(model.laconic["builder"])
    replace_(model, "relu1", nn.GELU())
    assert model.laconic["builder"] == builder


def test_blocks_are_kept_and_renumbered(net):
    second = net.blocks[2]
    keep_(net, "blocks", [0, 2])
    assert list(net.blocks._modules) == ["0", "1"] and net.blocks[1] is second
    assert edits_of(net) == {"lists": {"blocks": [0, 2]}}
    same(net)


def test_keeping_twice_counts_from_the_original(net):
    keep_(net, "blocks", [3, 1, 0])
    keep_(net, "blocks", [2, 0])
    assert edits_of(net) == {"lists": {"blocks": [0, 3]}}
    same(net)


def test_keeping_all_is_a_record_that_rebuilds(net):
    keep_(net, "blocks", [0, 1, 2, 3])
    same(net)


def test_names_of_an_ordered_sequential_stay(net):
    keep_(net, "head", [1])
    assert list(net.head._modules) == ["act"]
    assert edits_of(net) == {"lists": {"head": [1]}}
    same(net)


def test_records_follow_the_blocks_that_are_kept(net):
    replace_(net, "blocks.3.norm", nn.Identity())
    keep_(net, "blocks.1.inner", [2])
    resize_(net, "blocks.3.linear.bias", torch.zeros(5))
    resize_(net, "blocks.3.linear.weight", torch.zeros(5, 6))
    set_attributes_(net, "blocks.3.linear", {"out_features": 5})
    resize_(net, "blocks.3.inner.0.weight", torch.zeros(6, 5))
    set_attributes_(net, "blocks.3.inner.0", {"in_features": 5})
    replace_(net, "blocks.2.norm", nn.Identity())
    keep_(net, "blocks", [3, 1])
    assert edits_of(net) == {
        "lists": {"blocks": [3, 1], "blocks.1.inner": [2]},
        "modules": {"blocks.0.norm": {"Identity": {}}},
        "attributes": {
            "blocks.0.inner.0": {"in_features": 5},
            "blocks.0.linear": {"out_features": 5},
        },
        "shapes": ["blocks.0.inner.0.weight", "blocks.0.linear.bias", "blocks.0.linear.weight"],
    }
    same(net)


def test_a_module_is_replaced_wherever_it_stands(net):
    new = nn.GELU()
    replace_(net, "last", new)
    assert net.first is net.last is net.head.act is new
    places = ("first", "head.act", "last")
    assert edits_of(net)["modules"] == {place: {"GELU": {}} for place in places}
    same(net)
    again = rebuilt(net, Net())
    assert again.first is again.last is again.head.act


def test_two_modules_may_become_one(net):
    shared = nn.LayerNorm(6)
    replace_(net, "blocks.0.norm", shared)
    replace_(net, "blocks.1.norm", shared)
    assert len(edits_of(net)["modules"]) == 2
    same(net)


def test_what_is_replaced_keeps_the_mode(net):
    replace_(net, "blocks.0.norm", nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(6)))
    assert not any(module.training for module in net.modules())
    net.train()
    replace_(net, "blocks.1.norm", nn.Dropout(0.5).eval())
    assert all(module.training for module in net.modules())
    again = Net().eval()
    apply_edits_(again, edits_of(net), {})
    assert not any(module.training for module in again.modules())


def test_edits_below_what_is_replaced_are_forgotten(net):
    keep_(net, "blocks.0.inner", [0])
    resize_(net, "blocks.1.linear.bias", torch.zeros(3))
    set_attributes_(net, "blocks.1.linear", {"out_features": 3})
    replace_(net, "blocks.1.linear", nn.Linear(6, 6))
    replace_(net, "blocks.0.inner", nn.ModuleList([nn.Linear(6, 6)]))
    assert edits_of(net).keys() == {"modules"}
    same(net)


def test_an_edit_within_what_was_replaced_is_part_of_its_description(net):
    replace_(net, "blocks.0.norm", nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Tanh()))
    keep_(net, "blocks.0.norm", [0, 2])
    replace_(net, "blocks.0.norm.1", nn.Sequential(nn.ReLU(), nn.Identity()))
    keep_(net, "blocks.0.norm.1", [1])
    resize_(net, "blocks.0.norm.0.bias", torch.zeros(6))
    (spec,) = edits_of(net)["modules"].values()
    assert [next(iter(child)) for child in spec["Sequential"]["children"]] == [
        "Linear",
        "Sequential",
    ]
    assert edits_of(net).keys() == {"modules"}
    same(net)


def test_a_replaced_layer_may_be_cut(net):
    replace_(net, "blocks.0.linear", nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)))
    resize_(net, "blocks.0.linear.0.weight", torch.ones(2, 6))
    resize_(net, "blocks.0.linear.0.bias", torch.ones(2))
    set_attributes_(net, "blocks.0.linear.0", {"out_features": 2})
    resize_(net, "blocks.0.linear.1.weight", torch.ones(6, 2))
    set_attributes_(net, "blocks.0.linear.1", {"in_features": 2})
    same(net)
    replace_(net, "blocks.0.linear.1", nn.Linear(2, 6))
    same(net)


def test_an_edit_elsewhere_leaves_descriptions_alone(net):
    replace_(net, "blocks.0.linear", nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)))
    before = edits_of(net)["modules"]
    # Between the two halves of a cut no description would be right.
    resize_(net, "blocks.0.linear.0.weight", torch.ones(2, 6))
    resize_(net, "blocks.0.linear.0.bias", torch.ones(2))
    resize_(net, "blocks.0.linear.1.weight", torch.ones(6, 2))
    set_attributes_(net, "blocks.0.linear.1", {"in_features": 2})
    replace_(net, "last", nn.GELU())
    keep_(net, "blocks", [3, 0])
    assert edits_of(net)["modules"]["blocks.1.linear"] == before["blocks.0.linear"]
    set_attributes_(net, "blocks.1.linear.0", {"out_features": 2})
    same(net)


def test_the_old_module_may_stand_in_the_new_one(net):
    replace_(net, "blocks.0.linear", nn.Sequential(net.blocks[0].linear, nn.ReLU()))
    same(net)


def test_a_tied_tensor_is_resized_in_every_owner(net):
    resize_(net, "decoder.weight", torch.rand(7, 6))
    assert net.decoder.weight is net.embedding.weight
    assert net.embedding.weight.requires_grad
    set_attributes_(net, "embedding", {"num_embeddings": 7})
    set_attributes_(net, "decoder", {"out_features": 7})
    assert edits_of(net)["shapes"] == ["decoder.weight", "embedding.weight"]
    same(net, TOKENS % 7)
    again = rebuilt(net, Net())
    assert again.decoder.weight is again.embedding.weight


def test_buffers_are_resized_too(net):
    for name in ("weight", "bias", "running_mean", "running_var"):
        resize_(net, f"head.norm.{name}", torch.ones(5))
    set_attributes_(net, "head.norm", {"num_features": 5})
    assert isinstance(net.head.norm.weight, nn.Parameter)
    assert not isinstance(net.head.norm.running_mean, nn.Parameter)
    again = rebuilt(net, Net())
    assert again.head.norm.running_var.shape == (5,)


def test_a_resized_tensor_is_a_copy_that_learns_as_before(net):
    net.blocks[0].linear.bias.requires_grad_(False)
    given = torch.ones(4)
    resize_(net, "blocks.0.linear.bias", given)
    given.zero_()
    bias = net.blocks[0].linear.bias
    assert bias.sum() == 4 and not bias.requires_grad
    resize_(net, "blocks.0.linear.weight", torch.ones(4, 6, requires_grad=True).mul(2))
    assert net.blocks[0].linear.weight.is_leaf


def test_numbers_of_the_same_shape_are_no_edit(net):
    resize_(net, "blocks.0.linear.bias", torch.ones(6))
    assert net.blocks[0].linear.bias.sum() == 6
    assert edits_of(net) == {}


def test_attributes_may_be_tuples(net):
    for name in ("weight", "bias"):
        resize_(net, f"blocks.0.norm.{name}", torch.ones(3))
    set_attributes_(net, "blocks.0.norm", {"normalized_shape": [3]})
    assert net.blocks[0].norm.normalized_shape == (3,)
    assert rebuilt(net, Net()).blocks[0].norm.normalized_shape == (3,)


def test_a_laid_weight_is_resized_by_its_latent_one(net):
    lay(net, "blocks.0.linear.weight", Ternary())
    with pytest.raises(ModelError, match=r"latent weight 'blocks\.0\.linear\.parametrizations\."):
        resize_(net, "blocks.0.linear.weight", torch.ones(4, 6))
    resize_(net, "blocks.0.linear.parametrizations.weight.original", torch.rand(4, 6))
    assert net.blocks[0].linear.weight.shape == (4, 6)
    assert edits_of(net)["shapes"] == ["blocks.0.linear.weight"]
    lay(net, "blocks.1.linear.weight", Ternary(), mask=torch.ones(6, 6).bool())
    resize_(net, "blocks.1.linear.parametrizations.weight.0.mask", torch.eye(4, 6).bool())
    assert edits_of(net)["shapes"] == ["blocks.0.linear.weight"]
    resize_(net, "blocks.1.linear.parametrizations.weight.original", torch.rand(4, 6))
    bake(net)
    assert net.blocks[0].linear.weight.shape == (4, 6)
    assert int(net.blocks[1].linear.weight.count_nonzero()) <= 4


def test_copies_have_edits_of_their_own(net):
    keep_(net, "blocks", [0, 1])
    before = edits_of(net)
    copied = copy.deepcopy(net)
    keep_(copied, "blocks", [1])
    set_attributes_(copied, "decoder", {"out_features": 3})
    edits_of(net)["lists"]["blocks"].append(9)
    assert edits_of(net) == before


def test_the_root_may_be_a_list():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 2))
    keep_(model, "", [0, 1, 3])
    replace_(model, "1", nn.GELU())
    again = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 2))
    assert isinstance(rebuilt(model, again)[1], nn.GELU)


def test_a_list_in_two_places_shrinks_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.two = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    model = Twice()
    keep_(model, "two", [2, 0])
    assert edits_of(model) == {"lists": {"one": [2, 0]}}
    assert len(rebuilt(model, Twice()).two) == 2


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: replace_(m, "", nn.ReLU()), "the root of a network cannot be replaced"),
        (lambda m: replace_(m, "x", nn.ReLU()), "no module 'x'; choose one of: [a-z]"),
        (lambda m: replace_(m, "frist", nn.ReLU()), "no module 'frist'; did you mean 'first'"),
        (lambda m: replace_(m, "first", nn.LSTM(2, 2)), "rnn.LSTM cannot be described in a file"),
        (lambda m: replace_(m, "first", Block()), "Block cannot be described in a file"),
        (lambda m: keep_(m, "blocks", []), r"children 0 to 3; \[\] cannot be kept"),
        (lambda m: keep_(m, "blocks", [1, 1]), r"\[1, 1\] cannot be kept: name at least one"),
        (lambda m: keep_(m, "blocks", [4]), r"\[4\] cannot be kept"),
        (lambda m: keep_(m, "blocks", [-1]), r"\[-1\] cannot be kept"),
        (lambda m: keep_(m, "blocks", [True]), r"\[True\] cannot be kept"),
        (lambda m: keep_(m, "decoder", [0]), "'decoder' is a Linear; only children of a Module"),
        (lambda m: keep_(m, "block", [0]), "no module 'block'; did you mean 'blocks'"),
        (
            lambda m: set_attributes_(m, "decoder", {"out_feature": 3}),
            "no attribute 'out_feature' that may be set; did you mean 'out_features'",
        ),
        (lambda m: set_attributes_(m, "decoder", {"weight": 3}), "no attribute 'weight' that may"),
        (lambda m: set_attributes_(m, "decoder", {"groups": 3}), "no attribute 'groups' that may"),
        (lambda m: set_attributes_(m, "decoder", {"out_features": 0}), "9 and cannot become 0"),
        (lambda m: set_attributes_(m, "decoder", {"out_features": 1.0}), "cannot become 1.0"),
        (lambda m: set_attributes_(m, "decoder", {"out_features": True}), "cannot become True"),
        (lambda m: set_attributes_(m, "decoder", {"out_features": [3]}), r"cannot become \[3\]"),
        (lambda m: set_attributes_(m, "decoder", {"out_features": LARGEST + 1}), "from 1 to"),
        (
            lambda m: set_attributes_(m, "blocks.0.norm", {"normalized_shape": 3}),
            r"normalized_shape is \(6,\) and cannot become 3",
        ),
        (
            lambda m: set_attributes_(m, "blocks.0.norm", {"normalized_shape": [3, 2]}),
            r"cannot become \[3, 2\]",
        ),
        (lambda m: resize_(m, "decoder.weigth", torch.ones(1)), "no tensor 'weigth'; did you"),
        (lambda m: resize_(m, "decoder.bias", torch.ones(1)), "'decoder' has no tensor 'bias'"),
        (lambda m: resize_(m, "encoder.bias", torch.ones(1)), "no module 'encoder'; did you"),
        (lambda m: resize_(m, "decoder.weight", torch.ones(3)), r"with 2 dimensions on cpu"),
        (
            lambda m: resize_(m, "decoder.weight", torch.ones(0, 6)),
            r"with elements, not .* \[0, 6\]",
        ),
        (lambda m: resize_(m, "decoder.weight", torch.ones(3, 6).half()), "torch.float16"),
        (lambda m: resize_(m, "decoder.weight", torch.ones(3, 6, device="meta")), "on meta"),
    ],
)
def test_what_cannot_be_edited_is_refused_and_nothing_changes(net, edit, message):
    before = copy.deepcopy(net)
    with pytest.raises(ModelError, match=message):
        edit(net)
    assert repr(net) == repr(before) and edits_of(net) == {}
    assert all(map(torch.equal, net.state_dict().values(), before.state_dict().values()))


def test_one_wrong_attribute_sets_none(net):
    with pytest.raises(ModelError, match="'out_featurez'"):
        set_attributes_(net, "decoder", {"out_features": 3, "out_featurez": 3})
    assert net.decoder.out_features == 9


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"lists": {"blocks": [0, 9]}}, r"\[0, 9\] cannot be kept"),
        ({"lists": {"decoder": [0]}}, "only children of a ModuleList"),
        ({"lists": {"blocks": [0], "blocks.3.inner": [0]}}, r"no module 'blocks\.3\.inner'"),
        ({"modules": {"nowhere": {"ReLU": {}}}}, "no module 'nowhere'"),
        ({"modules": {"": {"ReLU": {}}}}, "is the root or within"),
        ({"modules": {"first": {"LSTM": {}}}}, "no layer is called 'LSTM'"),
        (
            {"modules": {"blocks.0": {"Identity": {}}, "blocks.0.norm": {"ReLU": {}}}},
            r"'blocks\.0\.norm' is the root or within a module that is replaced too",
        ),
        ({"attributes": {"decoder": {"weight": 1}}}, "no attribute 'weight'"),
        ({"attributes": {"decoder": {"training": 1}}}, "no attribute 'training'"),
        ({"shapes": ["decoder.weight"]}, r"'decoder\.weight' \[9, 6\] cannot be resized to \[\]"),
        ({"shapes": ["decoder.bias"]}, "no tensor 'bias'"),
    ],
)
def test_edits_that_do_not_fit_are_refused(net, edits, message):
    with pytest.raises(ModelError, match=message):
        apply_edits_(net, edits, {"decoder.bias": [3]})


@pytest.mark.parametrize("shape", [[3], [3, 6, 1], [0, 6], [-3, -6], [1 << 62, 2]])
def test_a_shape_that_is_none_is_refused(net, shape):
    with pytest.raises(ModelError, match="cannot be resized"):
        apply_edits_(net.to("meta"), {"shapes": ["decoder.weight"]}, {"decoder.weight": shape})


def test_edits_are_done_once(net):
    keep_(net, "blocks", [0, 1])
    apply_edits_(net, edits_of(net), {})
    assert len(net.blocks) == 2
    with pytest.raises(ModelError, match="edited otherwise already"):
        apply_edits_(net, {"lists": {"blocks": [0, 2]}}, {})
    with pytest.raises(ModelError, match="edited otherwise already"):
        apply_edits_(net, {}, {})


def test_an_edited_network_takes_the_edits_that_it_lacks(net):
    keep_(net, "blocks", [0, 2, 3])
    replace_(net, "blocks.1.norm", nn.Identity())
    replace_(net, "blocks.2.norm", nn.Identity())
    start = copy.deepcopy(net)
    keep_(net, "blocks", [1, 2])  # what was replaced has other names now
    replace_(net, "blocks.1.norm", nn.GELU())
    apply_edits_(start, edits_of(net), {})
    assert edits_of(start) == edits_of(net) and repr(start) == repr(net)


def test_a_network_changed_by_hand_is_told_apart(net):
    replace_(net, "blocks.3.norm", nn.Identity())
    net.blocks = net.blocks[:2]
    with pytest.raises(ModelError, match=r"'blocks\.3\.norm' was edited and is gone"):
        keep_(net, "blocks", [0])


def test_edits_go_on_where_a_resized_layer_was_replaced_later() -> None:
    def narrowed() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        for name, shape in (("0.weight", (3, 2)), ("0.bias", (3,)), ("2.weight", (2, 3))):
            resize_(model, name, torch.ones(shape))
        set_attributes_(model, "0", {"out_features": 3})
        set_attributes_(model, "2", {"in_features": 3})
        return model

    model, again = narrowed(), narrowed()
    replace_(model, "0", nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 3)))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    apply_edits_(again, edits_of(model), shapes)
    assert edits_of(again) == edits_of(model)
    assert {name: list(tensor.shape) for name, tensor in again.state_dict().items()} == shapes
    resize_(again, "2.bias", torch.ones(1))
    with pytest.raises(ModelError, match="edited otherwise"):
        apply_edits_(again, edits_of(model), shapes)
