"""Scope: which modules a text selects, and what it says when it selects none."""

import pytest
from torch import nn

from laconic.errors import ScopeError
from laconic.scope import KINDS, Scope
from laconic.structure.surgery import replace_


class Block(nn.Module):
    """One of several equal parts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        self.norm = nn.BatchNorm2d(1)
        self.linear = nn.Linear(1, 1)


@pytest.fixture
def network() -> nn.Module:
    parts = {"blocks": nn.Sequential(Block(), Block()), "head": nn.Linear(1, 1)}
    parts["words"] = nn.Embedding(2, 1)
    return nn.ModuleDict(parts)


def names(text: str, network: nn.Module) -> list[str]:
    return list(Scope(text).select(network))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("head", ["head"]),
        ("blocks.0.*", ["blocks.0.conv", "blocks.0.norm", "blocks.0.linear"]),
        ("kind:conv", ["blocks.0.conv", "blocks.1.conv"]),
        ("kind:linear", ["blocks.0.linear", "blocks.1.linear", "head"]),
        ("kind:norm", ["blocks.0.norm", "blocks.1.norm"]),
        ("kind:embedding", ["words"]),
        ("head, words", ["head", "words"]),
        ("words, head", ["head", "words"]),
        ("blocks.1.* kind:linear", ["blocks.1.linear"]),
        ("blocks.1.* kind:linear, kind:embedding", ["blocks.1.linear", "words"]),
        ("kind:linear, !head", ["blocks.0.linear", "blocks.1.linear"]),
        ("!head, kind:linear", ["blocks.0.linear", "blocks.1.linear"]),
        ("kind:linear, !blocks.0.* kind:linear", ["blocks.1.linear", "head"]),
        ("blocks.[01].conv", ["blocks.0.conv", "blocks.1.conv"]),
        ("head, head", ["head"]),
    ],
)
def test_selects_what_the_text_says_in_the_models_order(
    text: str, expected: list[str], network: nn.Module
) -> None:
    assert names(text, network) == expected


def test_star_selects_every_module_and_only_exceptions_start_from_all(network: nn.Module) -> None:
    everything = list(dict(network.named_modules()))
    assert names("*", network) == everything
    assert names("!head", network) == [name for name in everything if name != "head"]


def test_what_is_inside_of_an_exception_is_one_too() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    model = nn.Sequential(inner, nn.Linear(2, 2), *[nn.ReLU()] * 9)
    model.append(nn.Linear(2, 2))  # '11' is not inside of '1'
    assert list(Scope("kind:linear, !0").select(model)) == ["1", "11"]
    assert list(Scope("kind:linear, !1").select(model)) == ["0.0", "0.1.0", "11"]
    assert list(Scope("kind:linear, !0.1").select(model)) == ["0.0", "1", "11"]


def test_the_selected_modules_are_the_models_own(network: nn.Module) -> None:
    assert Scope("head").select(network)["head"] is network["head"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_understood(kind: str) -> None:
    assert Scope(f"kind:{kind}").text == f"kind:{kind}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("blocks.*.convv", ["'blocks.*.convv' selects no module", "blocks.0.conv"]),
        ("kind:conv head", ["'kind:conv head' selects no module; kind:conv and head have none"]),
        ("kind:conv haed", ["'kind:conv haed' selects no module; nearest: head"]),
        ("head, !tail", ["'tail' selects no module; its modules: "]),
        ("*.convv", ["'*.convv' selects no module; nearest: *.conv"]),
        ("blocs.0.*", ["'blocs.0.*' selects no module; nearest: blocks.0.*"]),
    ],
)
def test_a_term_that_selects_nothing_names_the_nearest(
    text: str, words: list[str], network: nn.Module
) -> None:
    with pytest.raises(ScopeError) as caught:
        Scope(text).select(network)
    for word in words:
        assert word in str(caught.value)


def test_in_a_flat_network_names_are_near() -> None:
    flat = nn.Sequential()
    flat.add_module("conv1", nn.Conv2d(1, 1, 1))
    with pytest.raises(ScopeError, match="selects no module; nearest: conv1"):
        Scope("*.conv9").select(flat)


def test_a_kind_that_the_network_has_not_is_named() -> None:
    with pytest.raises(ScopeError, match="'kind:norm' selects no module; the network has no norm"):
        Scope("kind:norm").select(nn.Linear(1, 1))


@pytest.mark.parametrize("text", ["", " ", "head,", ",head", "head, , words"])
def test_an_empty_part_is_refused(text: str) -> None:
    with pytest.raises(ScopeError, match="empty part"):
        Scope(text)


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(ScopeError, match="no kind 'lineer'; did you mean 'linear'"):
        Scope("kind:lineer")


@pytest.mark.parametrize("text", ["!", "!!head", "head !words"])
def test_a_misplaced_exclamation_mark_is_refused(text: str) -> None:
    with pytest.raises(ScopeError, match="goes before a pattern"):
        Scope(text)


def test_a_scope_is_a_value() -> None:
    assert Scope("head,words") == Scope("head, words")
    assert hash(Scope("head,words")) == hash(Scope("head, words"))
    assert Scope("head") != Scope("words")
    assert Scope("head") != "head"
    assert repr(Scope("head")) == "Scope('head')"
    assert str(Scope("head")) == "head"


def test_what_replaces_a_module_answers_to_its_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    replace_(model, "0", nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 8)))
    assert list(Scope("0").select(model)) == ["0", "0.0", "0.1"]
    assert list(Scope("0 kind:linear").select(model)) == ["0.0", "0.1"]
    assert list(Scope("kind:linear, !0").select(model)) == ["2"]
    assert list(Scope("0.1").select(model)) == ["0.1"]
