"""Tokenizers of text tasks: every kind of source, padding, refusals, and what a task keeps."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from helpers.text_tasks import WORDS, assert_same, pairs, plain_tokenizer, rows, saved
from laconic.errors import MissingExtra, TaskError
from laconic.tasks import Task, Texts, tokenizer_of
from laconic.tasks.tokens import as_tokenizer


def test_the_given_tokenizer_stays_as_it_is():
    tokenizer = plain_tokenizer()
    tokenizer.enable_padding(length=99, pad_id=4, pad_token="[MASK]")
    before = tokenizer.to_str()
    prepared = as_tokenizer(tokenizer, max_length=20)
    Texts(["a"], [0], prepared)
    assert tokenizer.to_str() == before
    assert prepared.padding["length"] is None and prepared.padding["pad_id"] == 4
    assert prepared.truncation["max_length"] == 20


def test_every_kind_of_tokenizer_gives_the_same_inputs(tmp_path):
    from transformers import BertTokenizer

    folder = saved(tmp_path / "new", pad_token="[PAD]")
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.txt").write_text("\n".join(WORDS))
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 64}
    (old / "tokenizer_config.json").write_text(json.dumps(settings))
    sources = [
        *(plain_tokenizer(), folder, str(folder), folder / "tokenizer.json", old),
        BertTokenizer.from_pretrained(old),
    ]
    prepared = [as_tokenizer(source, max_length=10) for source in sources]
    one, *others = [next(Texts(pairs(), range(50), each).batches(50)) for each in prepared]
    for other in others:
        assert_same([other], [one])


def test_the_padding_token_is_the_folders_own(tmp_path):
    for named in ("[MASK]", {"content": "[MASK]", "special": True}):
        assert as_tokenizer(saved(tmp_path, pad_token=named)).padding["pad_id"] == 4
    assert as_tokenizer(plain_tokenizer()).padding["pad_id"] == 0


def without_padding():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (plain_tokenizer(), {"max_length": 3}, "leaves no room beside 3 special tokens"),
        (plain_tokenizer(), {"max_length": 0}, "max_length 0 must be a number of tokens"),
        (plain_tokenizer(), {"max_length": "64"}, "max_length '64' must be"),
        (plain_tokenizer(), {"max_length": True}, "max_length True must be"),
        (plain_tokenizer(), {"multiple": 0}, "multiple 0 must be"),
        (plain_tokenizer(), {"max_length": 30, "multiple": 8}, "30 is no multiple of 8"),
        (plain_tokenizer(), {"padding": "longst"}, "'longst' is not known; did you mean 'longest'"),
        (without_padding(), {}, "has no padding token"),
        (3, {}, "int is no tokenizer that can be stored"),
        ("nowhere", {}, "nowhere is not there; give the folder of a Hugging Face model"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(source, options, message):
    with pytest.raises(TaskError, match=message):
        as_tokenizer(source, **options)


def test_a_folder_with_a_damaged_tokenizer_is_refused(tmp_path):
    with pytest.raises(TaskError, match=r"tokenizer.json is not there"):
        as_tokenizer(tmp_path)
    saved(tmp_path, model_max_length=32)
    with pytest.raises(TaskError, match="max_length 64 is above the 32 tokens"):
        as_tokenizer(tmp_path, max_length=64)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TaskError, match=r"tokenizer_config.json: no JSON"):
        as_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    for content in (b'{"version": "1.0"', b"\xff\xfe", b"{}"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(TaskError, match=r"tokenizer.json: cannot be read"):
            as_tokenizer(tmp_path)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(MissingExtra, match=r"pip install '\.\[hf\]'"):
        tokenizer_of(b"{}")


def test_the_tokenizer_travels_with_the_task():
    task = Task.from_texts(rows(), rows(), plain_tokenizer(), max_length=9)
    again = Task.from_texts(rows(), rows(), plain_tokenizer(), max_length=9)
    assert task.tokenizer == again.tokenizer and isinstance(task.tokenizer, bytes)
    coder = tokenizer_of(task.tokenizer)
    batch = next(task.test.batches(8))
    codes = coder.encode_batch([text for text, _ in rows()[:8]])
    assert batch.inputs["input_ids"].tolist() == [code.ids for code in codes]
    assert task.few(total=4).tokenizer == task.tokenizer
    other = Task.from_texts(rows(), rows(), plain_tokenizer(), max_length=10)
    assert task.describe() == again.describe() != other.describe()
    assert json.loads(json.dumps(task.describe())) == task.describe()
    with pytest.raises(TaskError, match=r"no tokenizer.json"):
        tokenizer_of(b"[1, 2]")
