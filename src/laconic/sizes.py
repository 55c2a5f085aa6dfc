"""Sizes as papers count them: the bytes of a network's parts, in two conventions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from laconic.errors import ModelError, nearest
from laconic.models.families import blocks_path, family_of
from laconic.names import joined, plain_name
from laconic.weights.laid import Laid, laid_tensors
from laconic.weights.representation import POSITION

__all__ = ["Count", "SizeReport", "size_report"]

Count = Literal["strict", "paper"]

WORDS = "word embedding"
WORD_TABLES = "tables of the word embedding"
PLACES = "positions and types"
ENCODER = "encoder matrices"
POOLER = "pooler"
HEAD = "head"
WEIGHTS = "weights"
BIASES = "biases"
NORMS = "norms"
TABLES = "other tables"
SURVIVORS = "positions of survivors"
PARTS = (
    WORDS,
    WORD_TABLES,
    PLACES,
    ENCODER,
    POOLER,
    HEAD,
    WEIGHTS,
    BIASES,
    NORMS,
    TABLES,
    SURVIVORS,
)
COUNTED: dict[Count, frozenset[str]] = {
    "strict": frozenset(PARTS),
    "paper": frozenset({WORDS, WORD_TABLES, ENCODER, POOLER, WEIGHTS, BIASES}),
}
MIB, MB = 2**20, 10**6

Place = Callable[[str, Tensor], str]


@dataclass(frozen=True)
class SizeReport:
    """How large a network is, part by part, in one convention.

    Attributes:
        count: "strict" or "paper"; see ``size_report``.
        parts: bytes of every part there is, counted or not; codes may end inside a byte.

    >>> from laconic.models import digits_cnn
    >>> print(size_report(digits_cnn(), count="paper"))
    0.15 MiB (0.16 MB) by the paper count, 0.15 MiB (0.16 MB) by the strict count
      weights                           0.153 MiB
      biases                            0.000 MiB
      norms                             0.001 MiB, not counted
    """

    count: Count
    parts: Mapping[str, float]

    @property
    def counted(self) -> dict[str, float]:
        """Return the bytes of the parts that the convention counts."""
        return {part: size for part, size in self.parts.items() if part in COUNTED[self.count]}

    @property
    def size_bytes(self) -> float:
        """Return the bytes that the convention counts."""
        return sum(self.counted.values())

    @property
    def mib(self) -> float:
        """Return the size in MiB (2^20 bytes), which the tables of papers call MB."""
        return self.size_bytes / MIB

    @property
    def mb(self) -> float:
        """Return the size in MB (10^6 bytes)."""
        return self.size_bytes / MB

    def __str__(self) -> str:
        counts = sorted(COUNTED, key=lambda count: count != self.count)
        reports = [SizeReport(count, self.parts) for count in counts]
        lines = [
            ", ".join(f"{r.mib:.2f} MiB ({r.mb:.2f} MB) by the {r.count} count" for r in reports)
        ]
        for part, size in self.parts.items():
            left_out = "" if part in self.counted else ", not counted"
            lines.append(f"  {part:<28}{size / MIB:>11.3f} MiB{left_out}")
        return "\n".join(lines)


def size_report(model: nn.Module, count: Count = "strict") -> SizeReport:
    """Return how many bytes a network takes, as papers count: codes, tables, floats.

    ``strict = sum(bits * codes) / 8 + 4 * tables + 4 * floats``: the codes of every laid weight,
    every number of its tables (scales, codebooks), one bit per weight where some are pruned, and
    every parameter that stays float32 (others by their own width). A file also holds a header,
    and entropy coding makes it smaller: ``measure`` has that size.

    ``paper`` leaves out norms, positions and token types, the task's head, the tables of all but
    the word embedding, and which weights survive. It gives what BinaryBERT's table prints
    (Bai et al. 2021, table 1), of BERT-base with row-wise scales of the embedding:
    ``(84,934,656 + 23,440,896 + 589,824) / 8 + 4 * 83,712 biases + 4 * 30,522 scales`` bytes are
    13.43 MiB (binary), and split, with the biases of two networks of half the width,
    ``2 (42,467,328 + 23,440,896 + 589,824) / 8 + 4 * 102,912 + 4 * 61,044`` are 16.48 MiB.

    The strict sizes of the literature are those with one scale per tensor, the embedding too:
    14.96 (binary), 17.90 (split), 27.95 (2 bits), 40.94 (3) and 105.89 MiB (8); scales of rows
    add 0.12 MiB to each, and 0.23 to the split one. What is laid decides.

    Buffers are not counted. Encoders of Hugging Face have their parts; of any other network, all
    tensors of two dimensions or more are "weights".

    Args:
        model: laid or plain; unchanged. The meta device does for representations whose sizes
            follow from shapes.
        count: "strict" or "paper".

    Raises:
        ModelError: there is no such count.

    >>> from laconic.models import digits_cnn
    >>> from laconic.weights import Binary, lay
    >>> network = digits_cnn()
    >>> lay(network, "fc1.weight", Binary())
    >>> size_report(network).parts["other tables"]
    4.0
    """
    if count not in COUNTED:
        raise ModelError(f"there is no count '{count}' of sizes{nearest(count, COUNTED)}")
    place, laid = _places(model), laid_tensors(model)
    bits: Counter[str] = Counter()
    for name, tensor in _parameters(model):
        part = place(name, tensor)
        layer, _ = laid.get(name, (None, tensor))
        if layer is None:
            bits[part] += 8 * tensor.nbytes
        else:
            bits.update(_coded(layer, tensor, part))
    return SizeReport(count, {part: bits[part] / 8 for part in PARTS if bits[part]})


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter under its plain name, a shared one once; learned tables are codes'."""
    tables = {
        id(tensor) for layer, _ in laid_tensors(model).values() for tensor in layer.parameters()
    }
    for name, tensor in model.named_parameters():
        if id(tensor) not in tables:
            yield plain_name(name), tensor


def _coded(layer: Laid, latent: Tensor, part: str) -> dict[str, int]:
    """Return the bits of a laid weight: of its codes, its tables and which of it survive."""
    codes = layer.encode(latent)
    streams = {name: one.bits * one.tensor.numel() for name, one in codes.streams.items()}
    survivors = streams.pop(POSITION, 0)
    tables = 8 * sum(table.nbytes for table in codes.tables.values())
    of_tables = WORD_TABLES if part == WORDS else TABLES
    if not streams:  # a float weight is a table of its own survivors
        of_tables = part
    found = Counter({part: sum(streams.values()), SURVIVORS: survivors})
    found[of_tables] += tables
    return found


def _places(model: nn.Module) -> Place:
    """Return what says which part a tensor belongs to, from its plain name."""
    family = family_of(model)
    # Not asked for as attributes: a laid weight would be decoded.
    with_matrix = {_owner(name) for name, tensor in _parameters(model) if tensor.dim() >= 2}

    def plain(name: str, tensor: Tensor) -> str:
        if tensor.dim() >= 2:
            return WEIGHTS
        biased = _owner(name) in with_matrix and "bias" in name.removeprefix(_owner(name))
        return BIASES if biased else NORMS

    if family is None:
        return plain
    blocks = blocks_path(model)
    base = next((blocks.removesuffix(path) for path in family.blocks if blocks.endswith(path)), "")
    paths = {WORDS: family.words, POOLER: family.pooler, PLACES: family.embeddings}

    def of_encoder(name: str, tensor: Tensor) -> str:
        if not name.startswith(base):
            return HEAD
        kind = plain(name, tensor)
        if kind != WEIGHTS:
            return kind
        parts = (p for p, path in paths.items() if path and _within(name, joined(base[:-1], path)))
        found = next(parts, ENCODER)
        module = model.get_submodule(_owner(name))
        # A projection of pixels or of embeddings is a matrix like those of the blocks.
        projects = found == PLACES and isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
        return ENCODER if projects else found

    return of_encoder


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _within(name: str, path: str) -> bool:
    return name.startswith(f"{path}.")
