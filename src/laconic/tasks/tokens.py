"""Texts as token ids in memory, and the tokenizers that make them."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from laconic.errors import MissingExtra, TaskError, nearest
from laconic.progress import progress
from laconic.step import generator_of
from laconic.tasks.split import Batch, Split, as_tensor, required

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["PADDINGS", "Texts", "as_tokenizer", "tokenizer_of"]

logger = logging.getLogger(__name__)

PADDINGS = ("longest", "max_length")
# What tokenizers call their padding where nothing else says so.
PAD_TOKENS = ("[PAD]", "<pad>")
# Files from which transformers can make a tokenizer.json.
VOCABULARIES = ("vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
TEXTS_AT_ONCE = 8192
# Training batches are sorted by length within so many of them.
WINDOW = 50
LONE = re.compile("[\ud800-\udfff]")
SHOWN = 60
# Networks whose first places are of padding.
OFFSET = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm")


class Texts(Split):
    """Tokenised texts in memory; each batch is padded to its longest text.

    The tokenizer says how long a text may be, what pads it and whether every batch is padded to
    that length (see as_tokenizer). Batches are named inputs, int64 [batch, tokens]: input_ids,
    attention_mask (1: a token, 0: padding) and token_type_ids. With a seed the examples are
    shuffled, sorted by length within windows of up to 50 batches, and the batches shuffled; what
    does not fill a batch comes last.

    Args:
        texts: strings, or pairs of strings.
        targets: labels (integers) or values (floats) [examples]; None: there are none.
        tokenizer: as as_tokenizer or tokenizer_of return it.

    Raises:
        TaskError: not texts, other lengths, a text without a token, targets that are not finite.
        MissingExtra: tokenizers is not installed.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> words = Tokenizer(models.WordLevel({"[PAD]": 0, "good": 1, "very": 2}, "[PAD]"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> data = Texts(["good", "very good"], [0, 1], as_tokenizer(words))
    >>> next(data.batches(2)).inputs["input_ids"]
    tensor([[1, 0],
            [2, 1]])
    """

    in_memory = True

    def __init__(self, texts: Sequence[Any], targets: Any, tokenizer: Tokenizer) -> None:
        self.labels = None if targets is None else as_tensor(targets, "targets")
        self.labelled = self.labels is not None
        if self.labels is not None and not self.labels.is_floating_point():
            self.labels = self.labels.long()
        if self.labels is not None and len(texts) != len(self.labels):
            raise TaskError(
                f"there are {len(texts)} texts and {len(self.labels)} targets; each example "
                "needs one of both"
            )
        padding, truncation = tokenizer.padding, tokenizer.truncation
        if padding is None or truncation is None:
            raise TaskError("the tokenizer neither pads nor cuts texts; use as_tokenizer(...)")
        self.pad, self.multiple = padding["pad_id"], padding["pad_to_multiple_of"] or 1
        self.longest, self.width = truncation["max_length"], padding["length"]
        self.ids, self.types, lengths = _encoded(texts, tokenizer, self.longest)
        self.starts, self.lengths = lengths.cumsum(0) - lengths, lengths
        self.index = torch.arange(len(lengths))

    def __len__(self) -> int:
        return len(self.index)

    def batches(
        self,
        size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        start: int = 0,
        device: str | torch.device = "cpu",
    ) -> Iterator[Batch]:
        """Yield the batches of one epoch; see Split."""
        order = self.index
        if seed is not None:
            order = self._shuffled(size, generator_of(seed, "order", epoch))
        for chosen in order.split(size)[start:]:
            yield self._batch(chosen, self.width).to(device)

    def any_order(self, size: int, *, device: str | torch.device = "cpu") -> Iterator[Batch]:
        """Yield every example once, the longest first, so that memory peaks early."""
        order = self.index[self.lengths[self.index].argsort(descending=True, stable=True)]
        for chosen in order.split(size):
            yield self._batch(chosen, self.width).to(device)

    def example(self, count: int = 1) -> Batch:
        """Return the first ``count`` examples, padded to the longest a text may be.

        Costs of a network are stated for texts of this length.
        """
        return self._batch(self.index[:count], self.longest)

    def subset(self, index: Sequence[int]) -> Texts:
        """Return the examples at these positions; the tokens are shared, not copied."""
        chosen = torch.as_tensor(index, dtype=torch.long)
        if not len(chosen):
            raise TaskError("a subset of no example was asked for; choose at least one")
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__ | {"index": self.index[chosen]})
        return other

    def targets(self) -> Tensor:
        """Return the targets of all examples, in order; see Split."""
        return required(self.labels)[self.index]

    def check(self, model: nn.Module) -> None:
        """Refuse a network of another vocabulary, or with places for fewer tokens.

        Raises:
            TaskError: its configuration says so.
        """
        config: Any = getattr(model, "config", None)
        known = getattr(config, "vocab_size", None) or math.inf
        places = getattr(config, "max_position_embeddings", None) or math.inf
        if getattr(config, "model_type", None) in OFFSET:
            places -= 1 + (config.pad_token_id or 0)
        highest = int(self.ids.max())
        if highest >= known:
            raise TaskError(
                f"the tokenizer gives token {highest} and {type(model).__name__} knows {known}, "
                "counted from 0; name the tokenizer of that network"
            )
        if self.longest > places:
            raise TaskError(
                f"texts may have {self.longest} tokens and {type(model).__name__} has places for "
                f"{places}; give max_length: {places}"
            )

    def _shuffled(self, size: int, generator: torch.Generator) -> Tensor:
        order = self.index[torch.randperm(len(self), generator=generator)]
        if self.width is not None:
            return order  # all are of one length
        count = len(order) // size
        filled, rest = order[: count * size], order[count * size :]
        # At least four windows, as transformers has it: what meets in a batch must vary.
        window = size * max(1, min(WINDOW, count // 4))
        ordered = [part[self.lengths[part].argsort(stable=True)] for part in filled.split(window)]
        batches = torch.cat(ordered).reshape(count, size)
        shuffled = batches[torch.randperm(count, generator=generator)]
        return torch.cat([shuffled.flatten(), rest])

    def _batch(self, chosen: Tensor, width: int | None) -> Batch:
        lengths = self.lengths[chosen, None]
        if width is None:
            width = -(-int(lengths.max()) // self.multiple) * self.multiple
        columns = torch.arange(width)
        real = columns < lengths
        # Beyond its end a text would read its neighbour, and the last one past the memory.
        places = torch.where(real, self.starts[chosen, None] + columns, 0)
        inputs = {
            "input_ids": torch.where(real, self.ids[places], self.pad).long(),
            "attention_mask": real.long(),
            "token_type_ids": torch.where(real, self.types[places], 0).long(),
        }
        return Batch(inputs, None if self.labels is None else self.labels[chosen], chosen)


def as_tokenizer(
    source: Any, *, max_length: int = 128, padding: str = "longest", multiple: int = 1
) -> Tokenizer:
    """Return a tokenizer that cuts and pads as asked; the given one stays as it is.

    Args:
        source: a folder of Hugging Face or its tokenizer.json, a ``tokenizers.Tokenizer``, or a
            (fast) tokenizer of transformers.
        max_length: tokens of one example, special ones included; of a pair the longer text is
            cut first. Texts are cut and padded at their end.
        padding: "longest": to the longest text of a batch; "max_length": always to that length.
        multiple: lengths are padded up to a multiple of this many tokens.

    Raises:
        TaskError: no tokenizer there, no padding token, lengths that cannot be.
        MissingExtra: tokenizers (or, for an old folder, transformers) is not installed.

    >>> as_tokenizer(Path("bert"), max_length=64).truncation["max_length"]  # doctest: +SKIP
    64
    """
    _check_lengths(max_length, padding, multiple)
    tokenizer, settings = _source(source)
    limit = settings.get("model_max_length")
    if isinstance(limit, int) and max_length > limit:
        raise TaskError(f"max_length {max_length} is above the {limit} tokens the network takes")
    special = tokenizer.num_special_tokens_to_add(is_pair=True)
    if max_length <= special:
        raise TaskError(
            f"max_length {max_length} leaves no room beside {special} special tokens; raise it"
        )
    pad, token = _padding(tokenizer, settings)
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(
        pad_id=pad,
        pad_token=token,
        length=max_length if padding == "max_length" else None,
        pad_to_multiple_of=multiple if multiple > 1 else None,
    )
    return tokenizer


def tokenizer_of(data: bytes) -> Tokenizer:
    """Return the tokenizer of the bytes that a task and an artefact carry.

    Args:
        data: the content of a tokenizer.json, UTF-8.

    Raises:
        TaskError: they are no tokenizer.
        MissingExtra: tokenizers is not installed.

    >>> from tokenizers import Tokenizer, models
    >>> tokenizer_of(Tokenizer(models.BPE()).to_str().encode()).get_vocab_size()
    0
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtra("tokenizers", "hf") from error
    try:
        return Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the library raises nothing more special
        raise TaskError(f"no tokenizer.json ({error}); save it again") from error


def _check_lengths(max_length: int, padding: str, multiple: int) -> None:
    for name, value in (("max_length", max_length), ("multiple", multiple)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise TaskError(f"{name} {value!r} must be a number of tokens above 0")
    if padding not in PADDINGS:
        raise TaskError(f"padding {padding!r} is not known{nearest(str(padding), PADDINGS)}")
    if max_length % multiple:
        raise TaskError(
            f"max_length {max_length} is no multiple of {multiple}; a padded text would be longer"
        )


def _source(source: Any) -> tuple[Tokenizer, Mapping[str, Any]]:
    """Return a tokenizer of our own, and what its folder says of padding and length."""
    if isinstance(source, str | Path):
        return _from_path(Path(source))
    # A fast tokenizer of transformers wraps one of tokenizers.
    inner = getattr(source, "backend_tokenizer", source)
    settings = {name: getattr(source, name, None) for name in ("pad_token", "model_max_length")}
    try:
        text = inner.to_str()
    except Exception as error:  # no method, or a part that was written in Python
        raise TaskError(
            f"{type(source).__name__} is no tokenizer that can be stored ({error}); give a folder "
            "with tokenizer.json, a tokenizers.Tokenizer or a fast tokenizer of transformers"
        ) from error
    return tokenizer_of(text.encode()), settings


def _from_path(path: Path) -> tuple[Tokenizer, Mapping[str, Any]]:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        if any((path / name).is_file() for name in VOCABULARIES):
            return _converted(path)
        raise TaskError(
            f"tokenizer: {file} is not there; give the folder of a Hugging Face model or its "
            "tokenizer.json"
        )
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= _json(file.parent / name)
    try:
        return tokenizer_of(file.read_bytes()), settings
    except (OSError, TaskError) as error:
        raise TaskError(f"{file}: cannot be read: {error}") from error


def _converted(folder: Path) -> tuple[Tokenizer, Mapping[str, Any]]:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtra("transformers", "hf") from error
    try:
        found = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # each kind of tokenizer fails in its own way
        raise TaskError(
            f"tokenizer: {folder} cannot be read ({error}); save the tokenizer there again"
        ) from error
    return _source(found)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TaskError(f"{path}: no JSON ({error}); save the tokenizer again") from error
    return found if isinstance(found, dict) else {}


def _padding(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> tuple[int, str]:
    """Return id and name of the token that pads."""
    named = settings.get("pad_token")
    if isinstance(named, Mapping):
        named = named.get("content")
    own = tokenizer.padding["pad_token"] if tokenizer.padding else None
    for token in (named, own, *PAD_TOKENS):
        number = None if token is None else tokenizer.token_to_id(str(token))
        if number is not None:
            return number, str(token)
    raise TaskError(
        f"the tokenizer has no padding token (looked for {', '.join(PAD_TOKENS)}); name it with "
        "tokenizer.enable_padding(pad_id=..., pad_token=...)"
    )


def _encoded(
    texts: Sequence[Any], tokenizer: Tokenizer, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and types of all tokens, one text after the other, and the texts' lengths."""
    unpadded = tokenizer_of(tokenizer.to_str().encode())
    unpadded.no_padding()
    rows = [_checked(row, number) for number, row in enumerate(texts)]
    ids, types, lengths = [], [], []
    for start in progress(range(0, len(rows), TEXTS_AT_ONCE), "tokenise"):
        codes = unpadded.encode_batch_fast(rows[start : start + TEXTS_AT_ONCE])
        ids.append(_flat(np.int32, (code.ids for code in codes)))
        types.append(_flat(np.uint8, (code.type_ids for code in codes)))
        lengths.append(_flat(np.int64, ([len(code)] for code in codes)))
    counts = torch.cat(lengths)
    if not bool(counts.all()):
        empty = int((counts == 0).nonzero()[0])
        raise TaskError(
            f"example {empty}, {texts[empty]!r:.{SHOWN}}, has no token; remove it, or use a "
            "tokenizer that knows its characters"
        )
    logger.info(
        "%d texts: %.1f tokens on average, %d texts at the limit of %d",
        *(len(counts), counts.float().mean(), int((counts >= longest).sum()), longest),
    )
    return torch.cat(ids), torch.cat(types), counts


def _flat(kind: Any, lists: Iterator[list[int]]) -> Tensor:
    return torch.from_numpy(np.fromiter(itertools.chain.from_iterable(lists), kind))


def _checked(row: Any, number: int) -> str | tuple[str, str]:
    """Return a text or a pair of texts as tokenizers take it."""
    parts = (row,) if isinstance(row, str) else row
    if not isinstance(parts, tuple | list) or len(parts) not in (1, 2):
        raise TaskError(f"example {number}, {row!r:.{SHOWN}}, is neither a text nor a pair of them")
    for part in parts:
        if not isinstance(part, str):
            raise TaskError(
                f"example {number}: {part!r:.{SHOWN}} is not a text; remove or repair it"
            )
        if not part.strip() or LONE.search(part):
            wrong = "not Unicode (half of a pair of code units)" if part.strip() else "empty"
            raise TaskError(f"example {number}: the text {part!r:.{SHOWN}} is {wrong}; remove it")
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])
