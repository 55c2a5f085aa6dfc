"""What a file says of a network's inputs: label names, normalisation, the tokenizer."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from laconic.cli.compressing import _tokenizer
from laconic.errors import ArtifactError
from laconic.ship import inputs_of, inspect, load, save
from laconic.ship.container import read, write
from laconic.tasks import Task, digits, tokenizer_of
from laconic.weights import Ternary, lay

tokenizers = pytest.importorskip("tokenizers", reason="the extra hf is not installed")
WORDS = ["[PAD]", "[UNK]", *"a bad good film is not this very".split()]


class Words(nn.Module):
    """The mean of word vectors, classified."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.classifier = nn.Embedding(len(WORDS), 8), nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[..., None]
        mean = (self.table(input_ids) * mask).sum(1) / mask.sum(1)
        return self.classifier(mean)


@pytest.fixture(scope="module")
def task() -> Task:
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    rows = [("this film is good", "praise"), ("this is not good", "blame")] * 20
    return Task.from_texts(rows, rows[:4], tokenizer)


@pytest.mark.parametrize("laid", [False, True], ids=["plain", "laid"])
def test_the_tokenizer_travels(task, laid, tmp_path):
    model, path = Words(), tmp_path / "model.safetensors"
    if laid:
        lay(model, "table.weight", Ternary("row"))
    size = save(model, path, task=task)
    found = inputs_of(path)
    assert found["tokenizer"] == task.tokenizer
    assert found["classes"] == list(task.classes) == ["blame", "praise"]
    again, first = load(path, model=Words()), task.example_batch(2)
    encoded = tokenizer_of(found["tokenizer"]).encode("this film is very bad")
    ids = torch.tensor([encoded.ids])
    with torch.no_grad():
        assert torch.equal(again(ids, torch.ones_like(ids)), model(ids, torch.ones_like(ids)))
    assert first.inputs["input_ids"].shape[0] == 2
    parts = inspect(path)
    assert parts.size_bytes == size == path.stat().st_size
    assert parts.dense_bytes > 0


def test_a_recipe_that_goes_on_from_a_file_reads_texts_by_its_tokenizer(task, tmp_path):
    save(Words(), tmp_path / "model.safetensors", task=task)
    found = _tokenizer({"laconic:load": {"path": "model.safetensors"}}, tmp_path)
    assert found.encode("this film").ids == tokenizer_of(task.tokenizer).encode("this film").ids
    own = _tokenizer({"words:make": {"weights": "model.safetensors"}}, tmp_path)
    assert own.encode("this film").ids == found.encode("this film").ids
    save(nn.Linear(2, 2), tmp_path / "plain.safetensors")
    assert _tokenizer({"laconic:load": {"path": "plain.safetensors"}}, tmp_path) is None
    save_file(Words().state_dict(), tmp_path / "state.safetensors")
    assert _tokenizer({"words:make": {"weights": "state.safetensors"}}, tmp_path) is None
    assert _tokenizer({"hf": "folder"}, tmp_path) == tmp_path / "folder"
    assert _tokenizer("digits_cnn", tmp_path) is None


def test_what_the_task_had_not_is_not_there(tmp_path):
    path = tmp_path / "model.safetensors"
    save(nn.Linear(2, 2), path)
    assert inputs_of(path) == {}
    save(nn.Linear(2, 2), path, task=digits())
    assert sorted(inputs_of(path)) == ["classes"]


@pytest.mark.parametrize(
    "entry",
    [
        [8, "huffman", 1 << 40, 10],
        [8, "no coder", 100, 10],
        [8, "packed", 10, 1 << 40],
        [9, "packed", 10, 10],
        [8, "rans", 7, 3],
        "tokenizer",
    ],
    ids=repr,
)
def test_a_lying_entry_is_refused(task, entry, tmp_path):
    path = tmp_path / "model.safetensors"
    save(Words(), path, task=task)
    data, blobs = read(path)
    data = json.loads(json.dumps(data)) | {"tokenizer": entry}
    write(path, data, blobs)
    with pytest.raises(ArtifactError):
        inputs_of(path)
