"""How many elements of axes pruning leaves, and which: rankings, multiples, scope."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.prune_axes import CASES, each_case, found, images, plain, pruned, sizes
from laconic.errors import ModelError
from laconic.step import State, run_step
from laconic.structure import BatchNormScale, Magnitude, Prune, Ranking
from laconic.structure.ranking import best_elements, padded


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


@pytest.mark.parametrize(
    ("groups", "left"), [((4,), (8, 4)), ((8,), (8, 4)), ((4, 2), (8, 4)), ((16,), (8, 8))]
)
def test_channels_of_groups_are_cut_to_the_share_once(
    groups: tuple[int, ...], left: tuple[int, int]
) -> None:
    model: nn.Module = nn.Sequential(nn.Conv2d(3, 16, 3))
    for each in groups:
        model.extend([nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=each)])
    model.append(nn.Conv2d(16, 4, 1))
    run_step(Prune("channels", keep=0.5), State(model, images()))
    convs = [module for module in model if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convs[:-1]] == [8] * (len(groups) + 1)
    assert convs[1].groups == left[1]


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
