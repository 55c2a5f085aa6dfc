"""What a family of networks calls its blocks, its attention and its feed-forward parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils import parametrize

from laconic.errors import ModelError

__all__ = ["FAMILIES", "SHAPE_ATTRIBUTES", "Family", "blocks_path", "family_of"]


@dataclass(frozen=True)
class Family:
    """The names that a family of Transformer encoders gives to its parts.

    Paths of ``blocks``, ``embeddings``, ``words`` and ``pooler`` start at the base model (``bert``,
    ``vit``, ...), all others at a block; an empty one means the family has no such part.

    Attributes:
        model_types: what the configurations of Hugging Face call the family.
        blocks: the list of blocks; several paths where versions differ, the first found counts.
        embeddings: the module whose output enters the first block.
        attention: the module that computes scores and context.
        query, key, value: the projections into heads.
        output: the projection out of heads.
        inner: the projection into the neurons of the feed-forward part.
        outer: the projection out of them.
        words: the embedding of tokens.
        pooler: what makes one vector of the last block's output.
        shared: one block computes every layer, so a position in ``blocks`` is not a depth.
        attributes: what a forward reads -> the kind of axis that it counts.
        config: the field of the configuration -> the kind of axis that it counts.
    """

    model_types: tuple[str, ...]
    blocks: tuple[str, ...]
    embeddings: str
    attention: str
    query: str
    key: str
    value: str
    output: str
    inner: str
    outer: str
    words: str = "embeddings.word_embeddings"
    pooler: str = "pooler"
    shared: bool = False
    attributes: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)


_BERT_CONFIG = {
    "hidden_size": "hidden",
    "intermediate_size": "neuron",
    "num_attention_heads": "head",
    "num_hidden_layers": "layer",
}
_BERT_ATTRIBUTES = {
    "num_attention_heads": "head",
    "attention_head_size": "head_dim",
    "all_head_size": "head*head_dim",
}

BERT = Family(
    model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra", "mobilebert"),
    blocks=("encoder.layer",),
    embeddings="embeddings",
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    inner="intermediate.dense",
    outer="output.dense",
    attributes=_BERT_ATTRIBUTES,
    config=_BERT_CONFIG,
)
DISTILBERT = Family(
    model_types=("distilbert",),
    blocks=("transformer.layer",),
    embeddings="embeddings",
    attention="attention",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    inner="ffn.lin1",
    outer="ffn.lin2",
    attributes={"n_heads": "head", "attention_head_size": "head_dim", "dim": "head*head_dim"},
    config={"dim": "hidden", "hidden_dim": "neuron", "n_heads": "head", "n_layers": "layer"},
)
ALBERT = Family(
    model_types=("albert",),
    blocks=("encoder.albert_layer_groups.0.albert_layers",),
    embeddings="embeddings",
    attention="attention",
    query="attention.query",
    key="attention.key",
    value="attention.value",
    output="attention.dense",
    inner="ffn",
    outer="ffn_output",
    shared=True,
    attributes=_BERT_ATTRIBUTES,
    config=_BERT_CONFIG,
)
VIT = Family(
    model_types=("vit", "deit"),
    blocks=("layers", "encoder.layer"),
    embeddings="embeddings",
    attention="attention",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
    inner="mlp.fc1",
    outer="mlp.fc2",
    words="",
    attributes={"num_attention_heads": "head", "head_dim": "head_dim"},
    config=_BERT_CONFIG,
)
FAMILIES: tuple[Family, ...] = (BERT, DISTILBERT, ALBERT, VIT)

# What layers of torch remember of their tensors' shapes, and what families' forwards read: all
# that an edit may set on a module, and all that a file may ask to be set.
SHAPE_ATTRIBUTES: frozenset[str] = frozenset(
    {
        "embedding_dim",
        "groups",
        "hidden_size",
        "in_channels",
        "in_features",
        "input_size",
        "normalized_shape",
        "num_channels",
        "num_embeddings",
        "num_features",
        "num_groups",
        "out_channels",
        "out_features",
        *(name for family in FAMILIES for name in family.attributes),
    }
)


def family_of(model: nn.Module) -> Family | None:
    """Return the family of a Hugging Face network, or None.

    >>> family_of(nn.Linear(2, 2)) is None
    True
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return next((family for family in FAMILIES if kind in family.model_types), None)


def blocks_path(model: nn.Module) -> str:
    """Return the dotted path, from the root, of the list of a network's blocks.

    A family knows its own; of another network it is the longest list of modules of one type.

    Raises:
        ModelError: there is no list of at least two blocks.

    >>> blocks_path(nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])))
    '0'
    """
    family = family_of(model)
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    }
    for blocks in family.blocks if family is not None else ():
        for name in lists:
            if name == blocks or name.endswith(f".{blocks}"):
                return name
    # What is laid on a block's own weight gives it a class of its own.
    kinds = {
        name: {parametrize.type_before_parametrizations(block) for block in module}
        for name, module in lists.items()
    }
    uniform = {name: len(lists[name]) for name in lists if len(lists[name]) > 1 == len(kinds[name])}
    if not uniform:
        raise ModelError(
            f"{type(model).__name__} has no list of blocks of one type (a ModuleList), so it has "
            "no layers to speak of; prune its channels instead"
        )
    return max(uniform, key=lambda name: uniform[name])
