"""What the tests of text tasks share: a small tokenizer, its texts, and a network."""

from __future__ import annotations

import json

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from laconic.tasks import Texts
from laconic.tasks.tokens import as_tokenizer

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a the good bad film was never dull very . \" ' ##s".split()
NAMES = ["input_ids", "attention_mask", "token_type_ids"]


def plain_tokenizer():
    """Return a small tokenizer of BERT's kind."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def saved(folder, tokenizer=None, **settings):
    folder.mkdir(exist_ok=True)
    (tokenizer or plain_tokenizer()).save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def sentences(count=50, seed=0):
    """Return texts of 1 to 12 words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 13, (count,), generator=generator).tolist()
    words = WORDS[5:14]
    picks = [torch.randint(len(words), (n,), generator=generator).tolist() for n in lengths]
    return [" ".join(words[number] for number in pick) for pick in picks]


def pairs(count=50):
    return list(zip(sentences(count), sentences(count, seed=1), strict=True))


def rows(count=40):
    """Return sentences and whether they hold the word good."""
    return [(sentence, int("good" in sentence)) for sentence in sentences(count)]


def texts(count=50, **options):
    return Texts(sentences(count), range(count), as_tokenizer(plain_tokenizer(), **options))


def wasted(batches):
    """Return the share of padding."""
    masks = [batch.inputs["attention_mask"] for batch in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def assert_same(one, other):
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left.targets, right.targets)
        assert all(torch.equal(left.inputs[name], right.inputs[name]) for name in NAMES)


class Mean(nn.Module):
    """The mean embedding of a text's tokens, and a line of outputs."""

    def __init__(self, outputs):
        super().__init__()
        self.embedding, self.head = nn.Embedding(len(WORDS), 8), nn.Linear(8, outputs)

    def forward(self, input_ids, attention_mask):
        hidden = self.embedding(input_ids) * attention_mask[..., None]
        return self.head(hidden.sum(dim=1) / attention_mask.sum(dim=1, keepdim=True))
