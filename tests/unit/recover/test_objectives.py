"""Objectives against the same written with torch, their sums, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.tensors import drawn
from laconic.errors import FeatureError, RecipeError
from laconic.models.capture import Features
from laconic.recipe import Recipe
from laconic.recover import (
    Annealing,
    Attention,
    AttentionTransfer,
    Chosen,
    Final,
    First,
    Hidden,
    HiddenCosine,
    Hint,
    Label,
    Last,
    LayerMap,
    Logits,
    Mutual,
    Objective,
    Patience,
    Relations,
    Skip,
    Sum,
    Train,
    Uniform,
)
from laconic.tasks import Batch, Task

HALF = torch.tensor([[True, True, True], [True, False, False]])


def task() -> Task:
    pair = (torch.zeros(6, 1), torch.arange(6) % 3)
    return Task(pair, pair, pair)


def worth(objective: Objective, student: Features, *teachers: Features, **options: Any) -> float:
    batch = Batch((), torch.tensor([0, 2]))
    return float(objective(student, teachers, batch, task=task(), **options))


# ------------------------------------------------------------------ sums and recipes


def test_sums_and_products_are_the_objectives_with_their_weights() -> None:
    both = 0.5 * Label() + 0.5 * Logits(temperature=4.0)
    assert both == Sum((Label(weight=0.5), Logits(4.0, weight=0.5)))
    assert 0.5 * Label() == Label(weight=0.5) == Label() * 0.5
    assert 2 * both == Label() + Logits(4.0)
    assert (Label() + Logits()) + Hidden() == Label() + (Logits() + Hidden())
    assert 0.5 * Label(weight=3.0) == Label(weight=1.5)
    inner = Sum((Label(), Label()), weight=2.0)
    assert (inner + Label()).terms == (inner, Label())


@pytest.mark.parametrize(
    ("text", "objective"),
    [
        ("label", Label()),
        ("[label]", Label()),
        ("[{label: {weight: 0.5}}]", Label(weight=0.5)),
        ("{logits: 4}", Logits(4.0)),
        ("[label, logits: {temperature: 4, loss: l2}]", Label() + Logits(4.0, loss="l2")),
        ("[hidden, attention, {logits: 1}]", Hidden() + Attention() + Logits()),
        ("[{hidden: {map: last}}, label]", Hidden(Last()) + Label()),
        ("{hidden: {map: [0, 0, 5, 10]}}", Hidden(Chosen((0, 0, 5, 10)))),
        ("{hidden: {map: {skip: 3}, embeddings: false}}", Hidden(Skip(3), embeddings=False)),
        ("{sum: {terms: [label], weight: 2}}", Sum((Label(),), weight=2.0)),
        ("[[label, logits], label]", Sum((Label() + Logits(), Label()))),
    ],
)
def test_a_recipe_writes_a_sum_as_a_list(text: str, objective: Objective) -> None:
    (step,) = Recipe.parse(f"steps: [train: {{objective: {text}}}]").steps
    assert step == Train(objective)
    assert Recipe.parse(Recipe([step]).to_yaml()).steps == (step,)


def test_a_sum_reads_plainly_in_a_recipe() -> None:
    text = Recipe([Train(0.5 * Label() + Logits(4.0))]).to_yaml()
    assert "sum" not in text and "- label:" in text and "- logits:" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "at least 1 item"),
        ("[label, 3]", r"terms\.1: an objective is written as its name"),
        ("[label, logits: {temprature: 2}]", "'temprature' is not a field; did you mean"),
        ("[label, lables]", "no objective is called 'lables'"),
        ("{logits: 0}", "temperature: input should be greater than 0"),
        ("{logits: {loss: mse}}", "loss"),
        ("{logits: {teacher: -1}}", "teacher"),
        ("{hidden: {map: []}}", "at least 1 item"),
        ("{hidden: {map: lst}}", "no layer_map is called 'lst'"),
        ("{hint: {at: 'a b'}}", "at"),
        ("{attention_transfer: {at: [output:a], of: [output:b, output:c]}}", "'of' names 2"),
    ],
)
def test_what_is_written_wrongly_is_located(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(f"steps: [train: {{objective: {text}}}]")


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(RecipeError, match="weight"):
        -1 * Label()


def test_a_sum_asks_for_what_its_terms_ask() -> None:
    both = Hidden(Final(), embeddings=False) + Hint("output:a", of="output:b", teacher=2) + Label()
    wants = both.wants(2, [4, 0, 0])
    assert wants.student == {"hidden.2", "output:a"}
    assert wants.teachers == {0: {"hidden.4"}, 2: {"output:b"}}
    assert both.teachers == {0, 2}
    assert (Label().teachers, Label().wants(0, [])) == (frozenset(), Label().wants(3, [1]))


def test_each_objective_learns_from_its_own_teacher() -> None:
    student = Features({"logits": drawn(2, 3)})
    teachers = [Features({"logits": drawn(2, 3, seed=n)}) for n in (1, 2)]
    first, second = (worth(Logits(teacher=n), student, *teachers) for n in (0, 1))
    assert first == worth(Logits(), student, teachers[0]) != second
    assert second == worth(Logits(), student, teachers[1])
    both = Logits() + 0.5 * Logits(teacher=1)
    assert worth(both, student, *teachers) == pytest.approx(first + 0.5 * second)


# ------------------------------------------------------------------ formulas


def logits(*shape: int) -> tuple[Features, Features]:
    return Features({"logits": drawn(*shape)}), Features({"logits": 2 * drawn(*shape, seed=1)})


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_torchs(temperature: float) -> None:
    student, teacher = logits(2, 5)
    own = (student["logits"] / temperature).log_softmax(-1)
    target = (teacher["logits"] / temperature).softmax(-1)
    kl = temperature**2 * F.kl_div(own, target, reduction="none")
    for reduction, expected in (("batch", float(kl.sum() / 2)), ("elements", float(kl.mean()))):
        found = worth(Logits(temperature, reduction=reduction), student, teacher)
        assert found == pytest.approx(expected)
    crossed = float(F.cross_entropy(student["logits"] / temperature, target))
    assert worth(Logits(temperature, loss="cross_entropy"), student, teacher) == pytest.approx(
        crossed
    )


def test_distances_between_logits() -> None:
    student, teacher = logits(2, 5)
    apart = teacher["logits"] - student["logits"]
    found = worth(Logits(loss="l2", reduction="elements"), student, teacher)
    assert found == pytest.approx(float(F.mse_loss(student["logits"], teacher["logits"])))
    assert worth(Logits(2.0, loss="l1"), student, teacher) == pytest.approx(
        float((apart / 2).abs().sum(-1).mean())
    )
    moved = [Features({"logits": f["logits"] + 7.0}) for f in (student, teacher)]
    assert worth(Logits(loss="l2"), *moved) == pytest.approx(
        worth(Logits(loss="l2"), student, teacher), rel=1e-5
    )


TAUGHT = [
    Logits(2.0),
    Logits(loss="cross_entropy"),
    Logits(loss="l2"),
    Logits(loss="l1", reduction="elements"),
    Annealing(3),
    Mutual(),
]


@pytest.mark.parametrize("objective", TAUGHT, ids=repr)
@pytest.mark.parametrize("places", [(4, 5), (2, 3, 2)])
def test_the_classes_of_maps_are_in_their_second_dimension(
    objective: Objective, places: tuple[int, ...]
) -> None:
    student, teacher = torch.randn(2, 3, *places), torch.randn(2, 3, *places)
    found, flat = (
        objective.compare(*({"logits": logits} for logits in pair))
        for pair in (
            (student, teacher),
            [each.movedim(1, -1).reshape(-1, 3) for each in (student, teacher)],
        )
    )
    assert float(found) == pytest.approx(float(flat), rel=1e-5)


@pytest.mark.parametrize("objective", TAUGHT, ids=repr)
def test_values_are_compared_and_have_no_distribution(objective: Objective) -> None:
    """[batch] as [batch, 1]."""
    student, teacher = torch.randn(8), torch.randn(8)
    one = ({"logits": student}, {"logits": teacher})
    if (
        getattr(objective, "loss", "kl") in ("kl", "cross_entropy")
        and objective.name != "annealing"
    ):
        with pytest.raises(FeatureError, match=r"a single output of shape \[8, 1\]"):
            objective.compare(*one)
    else:
        column = ({"logits": student[:, None]}, {"logits": teacher[:, None]})
        assert torch.equal(objective.compare(*one), objective.compare(*column))


def test_a_high_temperature_matches_logits() -> None:
    """Hinton et al. 2015, equation 4: the gradient tends to centred differences over C."""
    student, teacher = (f["logits"].double() for f in logits(1, 5))
    own = student.clone().requires_grad_(True)
    hot = Logits(1e4)
    hot(
        Features({"logits": own}), [Features({"logits": teacher})], Batch(()), task=task()
    ).backward()
    apart = student - teacher
    centred = (apart - apart.mean()) / 5
    torch.testing.assert_close(own.grad, centred, rtol=1e-3, atol=1e-4)


def test_annealing_regresses_growing_targets() -> None:
    student, teacher = logits(2, 5)
    for progress, share in ((0.0, 0.25), (0.26, 0.5), (0.74, 0.75), (0.99, 1.0), (1.0, 1.0)):
        apart = student["logits"] - share * teacher["logits"]
        found = worth(Annealing(4), student, teacher, progress=progress)
        assert found == pytest.approx(float(apart.square().sum(-1).mean()))


def layered(layers: int, shape: tuple[int, ...], kind: str, seed: int) -> Features:
    start = 0 if kind == "hidden" else 1
    return Features(
        {f"{kind}.{n}": drawn(*shape, seed=100 * seed + n) for n in range(start, layers + 1)},
        layers=layers,
    )


def test_hidden_states_and_embeddings_of_tinybert() -> None:
    student, teacher = layered(2, (2, 3, 4), "hidden", 0), layered(4, (2, 3, 4), "hidden", 1)
    pairs = [(0, 0), (1, 2), (2, 4)]
    losses = [float(F.mse_loss(student[f"hidden.{m}"], teacher[f"hidden.{n}"])) for m, n in pairs]
    assert worth(Hidden(), student, teacher) == pytest.approx(sum(losses))
    assert worth(Hidden(embeddings=False), student, teacher) == pytest.approx(sum(losses[1:]))
    student["mask"] = HALF
    apart = (student["hidden.2"] - teacher["hidden.4"]).square().mean(-1)
    found = worth(Hidden(Final(), embeddings=False), student, teacher)
    assert found == pytest.approx(float(apart[HALF].mean()))


def test_one_projection_is_shared_where_widths_differ() -> None:
    student, teacher = layered(2, (2, 3, 4), "hidden", 0), layered(4, (2, 3, 6), "hidden", 1)
    generator = torch.Generator().manual_seed(0)
    learned = Hidden().build(student, [teacher], generator)
    assert isinstance(learned, nn.Linear)
    assert (learned.in_features, learned.out_features, learned.bias is None) == (4, 6, False)
    assert float(learned.weight.detach().abs().max()) <= 0.5  # 1 / sqrt(4), as torch draws
    learned.requires_grad_(False)
    losses = [
        float(F.mse_loss(learned(student[f"hidden.{m}"]), teacher[f"hidden.{n}"]))
        for m, n in [(0, 0), (1, 2), (2, 4)]
    ]
    assert worth(Hidden(), student, teacher, learned=learned) == pytest.approx(sum(losses))
    total = Label() + Hidden() + Hint("hidden.1", of="hidden.1")
    built = total.build(student, [teacher], generator)
    assert isinstance(built, nn.ModuleDict) and sorted(built) == ["1", "2"]


def test_attention_of_tinybert() -> None:
    """The reference code: scores of padded keys are 0 in both, and the mean is over all."""
    student = layered(1, (2, 4, 3, 3), "attention", 0)
    teacher = layered(2, (2, 4, 3, 3), "attention", 1)
    own, target = student["attention.1"], teacher["attention.2"]
    assert worth(Attention(), student, teacher) == pytest.approx(float(F.mse_loss(own, target)))
    student["mask"] = HALF
    first = F.mse_loss(own[0], target[0])
    second = (own[1, :, 0, 0] - target[1, :, 0, 0]).square().mean()
    # Nine real pairs in the first example, one in the second.
    expected = float((9 * first + second) / 10)
    assert worth(Attention(), student, teacher) == pytest.approx(expected)


def test_relations_of_minilm() -> None:
    student = layered(1, (2, 4, 3, 3), "attention", 0)
    teacher = layered(1, (2, 4, 3, 3), "attention", 1)
    student["value.1"], teacher["value.1"] = drawn(2, 4, 3, 2, seed=5), drawn(2, 4, 3, 8, seed=6)
    found = worth(Relations(), student, teacher)
    expected = 0.0
    for kind in ("attention", "value"):
        own, target = student[f"{kind}.1"], teacher[f"{kind}.1"]
        if kind == "value":
            own = own @ own.mT / 2**0.5
            target = target @ target.mT / 8**0.5
        logs = own.log_softmax(-1).reshape(-1, 3), target.softmax(-1).reshape(-1, 3)
        expected += float(F.kl_div(*logs, reduction="batchmean"))
    assert found == pytest.approx(expected)
    student["mask"] = torch.tensor([[True, True, False]] * 2)
    short = [
        Features({"attention.1": f["attention.1"][..., :2, :2], "value.1": f["value.1"][:, :, :2]})
        for f in (student, teacher)
    ]
    for features in short:
        features.layers = 1
    assert worth(Relations(), student, teacher) == pytest.approx(worth(Relations(), *short))


def test_patience_of_pkd() -> None:
    """The reference code: all layers are stacked, normalised and compared by mse_loss."""
    student, teacher = layered(3, (2, 3, 4), "hidden", 0), layered(6, (2, 3, 4), "hidden", 1)
    own = torch.stack([student[f"hidden.{m}"][:, 0] for m in (1, 2)], dim=1)
    target = torch.stack([teacher[f"hidden.{n}"][:, 0] for n in (2, 4)], dim=1)
    expected = F.mse_loss(F.normalize(own, dim=2), F.normalize(target, dim=2))
    assert worth(Patience(), student, teacher) == pytest.approx(float(expected))
    larger = Features({name: 3 * tensor for name, tensor in student.items()}, layers=3)
    assert worth(Patience(), larger, teacher) == pytest.approx(float(expected))


def test_cosine_of_distilbert() -> None:
    student, teacher = layered(2, (2, 3, 4), "hidden", 0), layered(4, (2, 3, 4), "hidden", 1)
    student["mask"] = HALF
    own, target = student["hidden.2"][HALF], teacher["hidden.4"][HALF]
    expected = F.cosine_embedding_loss(own, target, torch.ones(4))
    assert worth(HiddenCosine(), student, teacher) == pytest.approx(float(expected))


def maps(channels: int, size: int, seed: int) -> Features:
    return Features({"output:a": drawn(2, channels, size, size, seed=seed)})


def test_a_hint_is_fitted_through_a_one_by_one_convolution() -> None:
    student, teacher = maps(3, 4, 0), maps(5, 4, 1)
    learned = Hint("output:a").build(student, [teacher], torch.Generator().manual_seed(0))
    assert isinstance(learned, nn.Linear)
    learned.requires_grad_(False)
    kernel = learned.weight[:, :, None, None]
    fitted = F.conv2d(student["output:a"], kernel, learned.bias)
    for loss, torchs in (("l2", F.mse_loss), ("l1", F.l1_loss)):
        found = worth(Hint("output:a", loss=loss), student, teacher, learned=learned)
        assert found == pytest.approx(float(torchs(fitted, teacher["output:a"])))
    assert Hint("output:a").build(student, [student], torch.Generator()) is None


def reference_attention(x: Tensor) -> Tensor:
    """The published code of attention transfer."""
    return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))


def test_attention_transfer_is_the_published_code() -> None:
    student, teacher = maps(3, 4, 0), maps(5, 4, 1)
    at = AttentionTransfer(("output:a",))
    own, target = (reference_attention(f["output:a"]) for f in (student, teacher))
    expected = float((own - target).pow(2).mean())
    assert worth(at, student, teacher) == pytest.approx(expected)
    scaled = Features({"output:a": -3 * student["output:a"][:, [2, 0, 1]]})
    assert worth(at, scaled, teacher) == pytest.approx(expected)
    squared = [Features({"output:a": f["output:a"].square()}) for f in (student, teacher)]
    assert worth(AttentionTransfer(("output:a",), power=1), *squared) == pytest.approx(expected)


def test_attention_maps_of_another_size_are_resized() -> None:
    student, teacher = maps(3, 2, 0), maps(3, 4, 1)
    raised = student["output:a"].square().mean(1, keepdim=True)
    resized = F.interpolate(raised, (4, 4), mode="bilinear", align_corners=False)
    own = F.normalize(resized.flatten(1))
    expected = float((own - reference_attention(teacher["output:a"])).square().mean())
    at = AttentionTransfer(("output:a",))
    assert worth(at, student, teacher) == pytest.approx(expected)


def test_convolutions_have_hidden_states_too() -> None:
    student = Features({"hidden.1": drawn(2, 3, 4, 4)}, layers=1)
    teacher = Features({"hidden.1": drawn(2, 3, 4, 4, seed=1)}, layers=1)
    expected = float(F.mse_loss(student["hidden.1"], teacher["hidden.1"]))
    found = worth(Hidden(embeddings=False), student, teacher)
    assert found == pytest.approx(expected)


# ------------------------------------------------------------------ layer maps


@pytest.mark.parametrize(
    ("layers", "student", "teacher"),
    [
        (Uniform(), 0, 12),
        (Uniform(), 3, 0),
        (Uniform(), 4, 3),
        (First(), 5, 4),
        (Last(), 5, 4),
        (Skip(3), 5, 12),
        (Chosen((0, 0)), 2, 4),
        (Chosen((1, 5)), 2, 4),
    ],
    ids=repr,
)
def test_a_map_that_leads_nowhere_is_refused(layers: LayerMap, student: int, teacher: int) -> None:
    message = rf"{student} layers of the student cannot learn from {teacher} of the teacher"
    with pytest.raises(FeatureError, match=message):
        layers.pairs(student, teacher)


def test_a_chosen_map_has_an_entry_for_each_layer() -> None:
    with pytest.raises(FeatureError, match="has 2 entries and the student 3 layers"):
        Chosen((1, 2)).pairs(3, 12)


# ------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(
    ("objective", "own", "taught", "message"),
    [
        (Logits(), {"logits": (2, 3)}, {"logits": (2, 5)}, r"\[2, 3\].*\[2, 5\].*same classes"),
        (Annealing(), {"logits": (2, 3)}, {"logits": (2, 5)}, "same classes"),
        (Mutual(), {"logits": (2, 3)}, {"logits": (2, 5)}, "same classes"),
        (Mutual(), {"logits": (2, 1)}, {"logits": (2, 1)}, "mutual: a single output"),
        (
            Logits(),
            {"logits": (2, 1)},
            {"logits": (2, 1)},
            "would teach nothing; use logits with loss: l2",
        ),
        (
            Attention(),
            {"attention.1": (2, 4, 3, 3)},
            {"attention.1": (2, 6, 3, 3)},
            r"'attention.1' of the student is \[2, 4, 3, 3\].*as many heads",
        ),
        (
            Hidden(embeddings=False),
            {"hidden.1": (2, 3, 4)},
            {"hidden.1": (2, 5, 4)},
            "the same tokens",
        ),
        (HiddenCosine(), {"hidden.1": (2, 3, 4)}, {"hidden.1": (2, 3, 6)}, "'hidden' projects"),
        (Patience(), {"hidden.1": (2, 3, 4)}, {"hidden.1": (2, 3, 4)}, "last of 1 layers"),
        (
            Hint("output:a"),
            {"output:a": (2, 3, 4, 2)},
            {"output:a": (2, 3, 2, 4)},
            "same height and width",
        ),
        (
            AttentionTransfer(("output:a",)),
            {"output:a": (2, 3)},
            {"output:a": (2, 3)},
            "choose a convolution's output",
        ),
        (Hidden(), {"logits": (2, 3)}, {"logits": (2, 3)}, "'hidden.0' was not taken"),
    ],
    ids=repr,
)
def test_features_that_do_not_fit_are_refused(
    objective: Objective, own: dict[str, Any], taught: dict[str, Any], message: str
) -> None:
    student, teacher = (
        Features({name: drawn(*shape) for name, shape in shapes.items()}, layers=1)
        for shapes in (own, taught)
    )
    with pytest.raises(FeatureError, match=message):
        worth(objective, student, teacher)


def test_a_first_token_is_needed() -> None:
    features = Features({"hidden.1": drawn(2, 3, 4, 4)}, layers=2)
    with pytest.raises(FeatureError, match="there is no first token"):
        worth(Patience(First()), features, features)


def test_one_projection_serves_one_width() -> None:
    student = Features({"hidden.1": drawn(2, 3, 4), "hidden.2": drawn(2, 3, 5)}, layers=2)
    teacher = Features({"hidden.1": drawn(2, 3, 8), "hidden.2": drawn(2, 3, 8)}, layers=2)
    with pytest.raises(FeatureError, match=r"\(4, 8\), \(5, 8\).*write a hint for each layer"):
        Hidden(embeddings=False).build(student, [teacher], torch.Generator())
