"""Named features of a forward: logits, hidden states, attention scores, any module's tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from laconic.errors import FeatureError, ModelError, TaskError, nearest
from laconic.models.attention import handing_on_padded
from laconic.models.families import FAMILIES, Family, blocks_path, family_of
from laconic.models.rounding import quantizer_of
from laconic.names import of_laid
from laconic.tasks.split import tensors_in

if TYPE_CHECKING:
    from laconic.tasks import Batch, Task

__all__ = [
    "Features",
    "attention_scores",
    "blocks_of",
    "capture",
    "layer_count",
    "observe",
    "padding_mask",
    "refuse_tokens_first",
]

# What observe knows without looking into the network.
GIVEN = ("logits", "mask")


class Features(dict[str, Tensor]):
    """Tensors of one forward by name; a missing one is an error that names the nearest.

    ``logits`` is what the task's call returned [batch, classes]; ``mask`` is True where a token
    is no padding [batch, tokens], only there if the batch has an ``attention_mask``.
    ``hidden.0`` is the input of the first block and ``hidden.N`` the output of block N, from 1
    [batch, tokens, width]. ``query.N``, ``key.N`` and ``value.N`` are [batch, heads, tokens, head
    size], ``attention.N`` are the scores before softmax [batch, heads, tokens, tokens], padded
    keys included. ``input:PATH`` and ``output:PATH`` are the first tensor that goes into or
    comes out of any module, the last time it was called.

    Args:
        tensors: by name.
        layers: how many blocks the network has; 0: it has no list of blocks.

    >>> Features({"logits": torch.zeros(1)}).get("mask") is None
    True
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None, *, layers: int = 0) -> None:
        super().__init__(tensors or {})
        self.layers = layers

    def detached(self) -> Features:
        """Return the same numbers, through which no gradient flows."""
        return Features({n: tensor.detach() for n, tensor in self.items()}, layers=self.layers)

    def __missing__(self, name: str) -> Tensor:
        hint = nearest(name, self)
        raise FeatureError(f"the feature '{name}' was not taken from this forward{hint}")


@dataclass(frozen=True)
class _Tap:
    """A tensor that enters or leaves a module.

    Attributes:
        module: what is called.
        side: "input" or "output".
        call: which call of a forward, from 0; None: the last one.
    """

    module: nn.Module
    side: str
    call: int | None = None


@dataclass(frozen=True)
class _Source:
    """How a feature is made: the tensors it needs, and a function of them."""

    taps: tuple[_Tap, ...]
    make: Callable[..., Tensor]


@contextmanager
def capture(model: nn.Module, names: Iterable[str]) -> Iterator[Features]:
    """Take features from a forward inside a with block; the model is left as it was.

    A second forward replaces the features of the first. The tensors keep their gradients and
    their dtype.

    Args:
        model: any network; the names of blocks and heads need a known family, or a list of blocks.
        names: see Features; all but ``logits`` and ``mask``, which only ``observe`` knows.

    Raises:
        FeatureError: no such feature; the forward did not produce one; or it was changed in
            place afterwards.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with capture(model, ["output:0"]) as features:
    ...     _ = model(torch.zeros(1, 2))
    >>> features["output:0"].shape
    torch.Size([1, 3])
    """
    root = model.module if isinstance(model, DistributedDataParallel) else model
    wanted = list(dict.fromkeys(names))
    blocks = blocks_of(root) if wanted else []
    recorder = _Recorder({name: _source(root, name, blocks) for name in wanted})
    recorder.features.layers = len(blocks)
    with recorder.watching(root):
        yield recorder.features
    recorder.check()


def observe(task: Task, model: nn.Module, batch: Batch, names: Iterable[str] = ()) -> Features:
    """Return features of a batch in float32, ``logits`` and ``mask`` among them.

    Args:
        task: knows how the model is called.
        model: in the mode it is in.
        batch: on the model's device.
        names: of more features; see Features.

    Raises:
        FeatureError: as ``capture``.
        TaskError: the outputs are no tensor, as of a network that returns others in training.

    >>> from laconic.tasks import Batch, digits
    >>> from laconic.models import digits_cnn
    >>> batch = digits().example_batch(2)
    >>> {n: tuple(t.shape) for n, t in observe(digits(), digits_cnn(), batch).items()}
    {'logits': (2, 10)}
    """
    with capture(model, [name for name in names if name not in GIVEN]) as features:
        answer = task.call(model, batch)
        if not isinstance(answer, Tensor):
            mode = "training" if model.training else "evaluation"
            raise TaskError(
                f"{task.name}: in {mode} mode the network returns {type(answer).__name__}, not "
                "one tensor of outputs; give the task call=(model, batch) -> outputs"
            )
        features["logits"] = answer
    single = {name: tensor.float() for name, tensor in features.items()}
    taken = Features(single, layers=features.layers)
    mask = padding_mask(batch)
    if mask is not None:
        taken["mask"] = mask
    return taken


def padding_mask(batch: Batch) -> Tensor | None:
    """Return where tokens are no padding [batch, tokens], or None where a batch does not say.

    >>> from laconic.tasks import Batch
    >>> padding_mask(Batch({"attention_mask": torch.tensor([[1, 0]])}))
    tensor([[ True, False]])
    """
    inputs = batch.inputs if isinstance(batch.inputs, Mapping) else {}
    mask = inputs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def refuse_tokens_first(name: str, feature: Tensor, mask: Tensor | None) -> None:
    """Refuse a padded feature [tokens, batch, ...]: which of it is padding would be mistaken.

    Args:
        name: of the feature, for the message.
        feature: of any shape.
        mask: bool [batch, tokens], as ``padding_mask`` gives it.

    Raises:
        FeatureError: it is one.

    >>> refuse_tokens_first("hidden.1", torch.zeros(2, 7, 4), torch.ones(2, 7).bool())
    """
    if mask is None or feature.dim() != 3:
        return
    sizes = [*mask.shape]
    if [*feature.shape[:2]] != sizes and [*feature.shape[:2]] == sizes[::-1]:
        raise FeatureError(
            f"'{name}' is {list(feature.shape)} where the mask is {sizes} [batch, tokens]: tokens "
            "before examples, so what is padding in it cannot be left out; build the network with "
            "examples first (batch_first=True)"
        )


def blocks_of(root: nn.Module) -> list[nn.Module]:
    """Return the blocks in the order of their calls; one that is shared, once for each.

    >>> from laconic.models import resnet
    >>> len(blocks_of(resnet(8)))
    3
    """
    try:
        found = root.get_submodule(blocks_path(root))
    except ModelError:
        return _stages(root)
    family, blocks = family_of(root), list(cast("nn.ModuleList", found))
    if family is None or not family.shared:
        return blocks
    depth = next(name for name, kind in family.config.items() if kind == "layer")
    return blocks * int(getattr(root.config, depth))


def layer_count(model: nn.Module) -> int:
    """Return how many blocks a forward passes, or 0 where a network has no list of blocks.

    >>> from laconic.models import digits_cnn, resnet
    >>> layer_count(resnet(20)), layer_count(digits_cnn())
    (9, 0)
    """
    return len(blocks_of(model))


def attention_scores(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Return Q K^T scaling, the attention scores before mask and softmax, in float32.

    Args:
        query: [batch, heads, tokens, head size].
        key: [batch, heads, tokens, head size].
        scaling: 1 / sqrt(head size), or what the network uses.

    >>> attention_scores(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0.5).shape
    torch.Size([1, 1, 2, 2])
    """
    with torch.autocast(query.device.type, enabled=False):
        wide = torch.promote_types(query.dtype, torch.float32)
        # There are fewer queries to multiply than scores.
        return (query.to(wide) * scaling) @ key.to(wide).transpose(-1, -2)


class _Recorder:
    """Fills features from hooks while a forward runs."""

    def __init__(self, sources: Mapping[str, _Source]) -> None:
        self.sources = sources
        self.features = Features()
        self.taps = dict.fromkeys(tap for source in sources.values() for tap in source.taps)
        self.tensors: dict[_Tap, Tensor] = {}
        self.versions: dict[_Tap, int] = {}
        self.calls: Counter[tuple[nn.Module, str]] = Counter()

    @contextmanager
    def watching(self, root: nn.Module) -> Iterator[None]:
        """Hook what the features need, and unhook it whatever happens."""
        with ExitStack() as stack:
            if self.taps:
                stack.enter_context(handing_on_padded(root))
                stack.enter_context(root.register_forward_pre_hook(self.begin))
            for module, side in dict.fromkeys((tap.module, tap.side) for tap in self.taps):
                if side == "input":
                    hook = module.register_forward_pre_hook(self.enter, with_kwargs=True)
                else:
                    hook = module.register_forward_hook(self.leave)
                stack.enter_context(hook)
            yield

    def begin(self, root: nn.Module, inputs: Any) -> None:
        """Forget the forward before this one."""
        for kept in (self.features, self.tensors, self.versions, self.calls):
            kept.clear()

    def enter(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Note what goes into a module."""
        self.note(module, "input", (inputs, named.get("hidden_states"), named))

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Note what comes out of a module."""
        self.note(module, "output", output)

    def note(self, module: nn.Module, side: str, value: Any) -> None:
        """Keep a tensor under its taps and make the features that were waiting for it."""
        call = self.calls[module, side]
        self.calls[module, side] += 1
        taps = {_Tap(module, side, call), _Tap(module, side)} & self.taps.keys()
        if not taps:
            return
        tensor = next(tensors_in(value), None)
        if tensor is None:
            names = [n for n, source in self.sources.items() if not taps.isdisjoint(source.taps)]
            raise FeatureError(
                f"'{names[0]}' was empty: the {side} of {type(module).__name__} holds no tensor, "
                f"but {type(value).__name__}; capture another module"
            )
        for tap in taps:
            self.tensors[tap] = tensor
            self.versions[tap] = _version(tensor)
        for name, source in self.sources.items():
            if not taps.isdisjoint(source.taps) and self.tensors.keys() >= set(source.taps):
                self.features[name] = source.make(*(self.tensors[tap] for tap in source.taps))

    def check(self) -> None:
        """Refuse a feature that never came, or is not what it was."""
        for name, source in self.sources.items():
            if name not in self.features:
                raise FeatureError(
                    f"'{name}' was not produced: the forward did not call "
                    f"{type(source.taps[0].module).__name__} that often; capture another module"
                )
            if any(_version(self.tensors[tap]) != self.versions[tap] for tap in source.taps):
                raise FeatureError(
                    f"'{name}' was changed in place after it was taken, such as by "
                    "ReLU(inplace=True); set inplace=False there, or take the output of that"
                )


def _version(tensor: Tensor) -> int:
    # Inside torch.inference_mode nothing is counted.
    return 0 if tensor.is_inference() else tensor._version


def _source(root: nn.Module, name: str, blocks: list[nn.Module]) -> _Source:
    """Return how a feature is made of a network's tensors."""
    kind, _, path = name.partition(":")
    if kind in ("input", "output") and path:
        modules = dict(root.named_modules())
        if path in modules:
            return _Source((_Tap(modules[path], kind),), _same)
        own = [module for module in modules if module and not of_laid(module)]
        hint = nearest(path, own)
        raise FeatureError(f"'{name}': the network has no module '{path}'{hint}")
    found = re.fullmatch(r"(hidden|attention|query|key|value)\.(\d+)", name)
    if found is None:
        hint = nearest(name, ["hidden.N", "attention.N", "query.N", "input:PATH", "output:PATH"])
        raise FeatureError(f"no feature is called '{name}'{hint}")
    layer = int(found[2])
    if layer > len(blocks) or (layer == 0 and found[1] != "hidden"):
        raise FeatureError(_out_of_range(root, name, len(blocks)))
    if found[1] != "hidden":
        return _attention_source(root, found[1], blocks, layer)
    if layer == 0:
        return _Source((_Tap(blocks[0], "input", 0),), _same)
    return _Source((_block_tap(blocks, layer, blocks[layer - 1]),), _same)


def _out_of_range(root: nn.Module, name: str, count: int) -> str:
    kind = name.partition(".")[0]
    if not count:
        return (
            f"'{name}': {type(root).__name__} has no list of blocks, so its layers have no number; "
            "take 'output:PATH' of a module instead"
        )
    first = 0 if kind == "hidden" else 1
    return (
        f"'{name}': {type(root).__name__} has {count} blocks, so the features are '{kind}.{first}' "
        f"to '{kind}.{count}'"
    )


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _block_tap(blocks: list[nn.Module], layer: int, module: nn.Module) -> _Tap:
    """Return the output of a module of block ``layer``, counting calls where blocks are shared."""
    earlier = sum(block is blocks[layer - 1] for block in blocks[: layer - 1])
    return _Tap(module, "output", earlier)


def _attention_source(root: nn.Module, kind: str, blocks: list[nn.Module], layer: int) -> _Source:
    """Return how projections into heads, or scores, are made."""
    family = family_of(root)
    if family is None:
        known = ", ".join(name for family in FAMILIES for name in family.model_types)
        raise FeatureError(
            f"'{kind}.{layer}': what {type(root).__name__} calls its heads is unknown; networks of "
            f"Hugging Face have this feature ({known})"
        )
    block = blocks[layer - 1]
    attention = block.get_submodule(family.attention)
    size, scaling = _head(family, attention)

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, size)).transpose(1, 2)

    def tap(part: str, quantizer: nn.Module | None = None) -> _Tap:
        projection = block.get_submodule(getattr(family, part))
        return _block_tap(blocks, layer, projection if quantizer is None else quantizer)

    if kind != "attention":
        return _Source((tap(kind),), heads)
    # What was rounded is taken, and not rounded again: a range that follows would move twice.
    rounding = {part: quantizer_of(attention, part) for part in ("query", "key")}
    split = [heads if quantizer is None else _same for quantizer in rounding.values()]

    def scores(query: Tensor, key: Tensor) -> Tensor:
        return attention_scores(split[0](query), split[1](key), scaling)

    return _Source(tuple(tap(*each) for each in rounding.items()), scores)


def _head(family: Family, attention: nn.Module) -> tuple[int, float]:
    """Return the size of a head, and what scores are multiplied by."""
    attribute = next(name for name, kind in family.attributes.items() if kind == "head_dim")
    size = int(getattr(attention, attribute))
    return size, float(getattr(attention, "scaling", size**-0.5))


def _stages(root: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network without a list of several: the commonest kind in sequences.

    A ResNet's stages are Sequentials of blocks of one type; all of them count, in order. Without
    any, the only list of a single block.
    """
    kinds: dict[type, list[nn.Module]] = {}
    for module in root.modules():
        children = list(module.children()) if isinstance(module, nn.Sequential) else []
        types = {parametrize.type_before_parametrizations(child) for child in children}
        if len(types) == 1 and all(any(True for _ in child.children()) for child in children):
            kinds.setdefault(types.pop(), []).extend(children)
    largest = max(kinds.values(), key=len, default=[])
    if len(largest) > 1:
        return largest
    single = [m for m in root.modules() if isinstance(m, nn.ModuleList) and len(m) == 1]
    return list(single[0]) if len(single) == 1 else []
