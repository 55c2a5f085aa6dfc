"""Networks and tasks whose axes are pruned, and what is left of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from laconic.errors import LaconicError
from laconic.models import resnet, vgg
from laconic.scope import Scope
from laconic.step import State, Step, run_step
from laconic.structure.axes import Axis
from laconic.structure.elements import axes_of, roles
from laconic.tasks import Task
from laconic.tasks.split import Batch
from laconic.weights.laid import latent_of

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


def refused(step: Step, model: nn.Module, task: Task | None) -> str:
    """Return why a step is refused before any work, and refuses to work."""
    with pytest.raises(LaconicError) as checked:
        step.check(model, task)
    with pytest.raises(LaconicError) as applied:
        run_step(step, State(model, task))
    assert type(checked.value) is type(applied.value)
    return f"{type(checked.value).__name__}: {checked.value}"
