"""GLUE tasks: their files as published, broken and real ones, and their lines in a recipe."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.text_tasks import Mean, plain_tokenizer, saved, wasted
from laconic.cli.shared import task_of
from laconic.errors import TaskError
from laconic.ship import save
from laconic.tasks import Task, read_glue, task_from_dict
from laconic.tasks.glue_files import TASKS, glue_name
from laconic.tasks.task import call_model

PAIR = "index\tsentence1\tsentence2\tlabel\n"
SCORED = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
FILES = {
    "CoLA": ("", "gj04\t{1}\t*\tthe film was never dull\n", ("0", "1")),
    "MNLI": (
        "premise\thypothesis\tlabel\n",
        "the film\ta film\t{}\n",
        ("neutral", "entailment", "contradiction"),
    ),
    "MRPC": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
        '{}\t1\t2\the said "good\tgood\n',
        ("1", "0"),
    ),
    "QNLI": (
        "index\tquestion\tsentence\tlabel\n",
        "0\twas the film good\tnever\t{}\n",
        ("not_entailment", "entailment"),
    ),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n",
        "\t\t\twas the film good\twas a film bad\t{}\n",
        ("0", "1"),
    ),
    "RTE": (PAIR, "0\tthe film\ta film\t{}\n", ("entailment", "not_entailment")),
    "SST-2": ("sentence\tlabel\n", "the film was never dull \t{}\n", ("0", "1")),
    "STS-B": (SCORED, "0\tg\tf\t2012\t1\tn\tn\tgood film\tbad film\t{}\n", ("2.500", "5.000")),
    "WNLI": (PAIR, "0\tthe film\ta film\t{}\n", ("0", "1")),
}
FILES["CoLA"] = ("", "gj04\t{}\t*\tthe film was never dull\n", ("0", "1"))


def glue_folder(root, name, files=("train.tsv", "dev.tsv"), times=4, change=lambda text: text):
    """Write the files of a GLUE task and return their folder."""
    folder = root / name
    folder.mkdir(exist_ok=True)
    header, line, labels = FILES[name]
    text = change(header + "".join(line.format(label) for label in labels) * times)
    for file in files:
        content = text.encode()
        (folder / file).write_bytes(gzip.compress(content) if file.endswith(".gz") else content)
    return folder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", ["tsv", "tsv.gz"])
def test_every_task_is_read_as_it_is_published(tmp_path, name, suffix):
    folder = glue_folder(tmp_path, name, (f"train.{suffix}", f"dev.{suffix}"))
    task = Task.from_glue(folder, plain_tokenizer(), max_length=32)
    count = 4 * len(FILES[name][2])
    assert (len(task.train) + len(task.validate), len(task.test)) == (count, count)
    assert task.name == name and list(task.metrics) == list(TASKS[name].metrics)
    wanted = [
        task.classes.index(label) if task.classes else float(label) for label in FILES[name][2]
    ]
    assert task.test.targets()[: len(wanted)].tolist() == wanted
    two = name not in ("CoLA", "SST-2")
    assert bool(next(task.test.batches(2)).inputs["token_type_ids"].any()) == two
    model = Mean(max(1, len(task.classes)))
    assert task.score(model).keys() == {*TASKS[name].metrics, "loss"}
    assert torch.isfinite(
        task.loss(call_model(model, task.example_batch(4)), task.example_batch(4))
    )


def test_main_metrics_and_label_orders_are_the_official_ones(tmp_path):
    mains = {name: next(iter(layout.metrics)) for name, layout in TASKS.items()}
    assert mains.pop("CoLA") == "matthews" and mains.pop("STS-B") == "pearson"
    assert set(mains.values()) == {"accuracy"}
    assert "f1" in TASKS["MRPC"].metrics and "f1" in TASKS["QQP"].metrics
    folder = glue_folder(tmp_path, "MNLI")
    task = Task.from_glue(folder, plain_tokenizer())
    assert task.classes == ("entailment", "neutral", "contradiction")
    order = ["contradiction", "entailment", "neutral"]
    other = Task.from_glue(folder, plain_tokenizer(), classes=order)
    assert other.classes == tuple(order)
    assert task.test.targets()[:3].tolist() == [1, 0, 2]
    assert other.test.targets()[:3].tolist() == [2, 1, 0]
    with pytest.raises(TaskError, match="are not its labels; give"):
        Task.from_glue(folder, plain_tokenizer(), classes=["yes", "no", "maybe"])


def test_files_are_found_in_the_documented_order(tmp_path):
    folder = glue_folder(tmp_path, "MNLI", ("train_subset.tsv.gz", "dev_matched.tsv"), times=3)
    glue_folder(tmp_path, "MNLI", ("dev_mismatched.tsv.gz", "heldout_subset.tsv"), times=2)
    sizes = [
        len(Task.from_glue(folder, plain_tokenizer(), **options).test)
        for options in (
            {},
            {"test": "dev_mismatched"},
            {"test": "dev_mismatched.tsv.gz"},
            {"test": "heldout_subset"},
        )
    ]
    assert sizes == [9, 6, 6, 6]
    given = Task.from_glue(folder, plain_tokenizer(), validate="heldout_subset")
    assert (len(given.train), len(given.validate)) == (9, 6)
    glue_folder(tmp_path, "MNLI", ("train.tsv", "dev.tsv"), times=1)
    task = Task.from_glue(folder, plain_tokenizer())
    assert (len(task.train) + len(task.validate), len(task.test)) == (3, 3)


def test_names_of_tasks_are_read_kindly(tmp_path):
    for name in ("SST-2", "sst2", "Sst_2"):
        assert glue_name(Path("x") / name) == "SST-2"
    folder = glue_folder(tmp_path, "SST-2").rename(tmp_path / "films")
    assert Task.from_glue(folder, plain_tokenizer(), name="sst-2").name == "SST-2"
    with pytest.raises(TaskError, match=r"no task is called 'films'; choose one of: CoLA.*name="):
        Task.from_glue(folder, plain_tokenizer())
    with pytest.raises(TaskError, match="no task is called 'SST-3'; did you mean 'SST-2'"):
        Task.from_glue(folder, plain_tokenizer(), name="SST-3")


UNLABELLED = {
    "SST-2": "sentence\n" + "the film was never dull\n" * 5,
    "CoLA": "index\tsentence\n" + "3\tthe film was never dull\n" * 5,
    "MRPC": "#1 String\t#2 String\n" + 'he said "good\tgood\n' * 5,
    "STS-B": "sentence1\tsentence2\n" + "good film\tbad film\n" * 5,
}


@pytest.mark.parametrize("name", UNLABELLED)
def test_a_training_file_may_be_without_labels(tmp_path, name):
    folder = glue_folder(tmp_path, name, ("dev.tsv", "held.tsv"))
    (folder / "texts.tsv").write_text(UNLABELLED[name])
    saved(tmp_path / "bert")
    line = {"glue": name, "train": "texts", "validate": "held", "tokenizer": "bert"}
    task = task_from_dict(line, base=tmp_path)
    assert not task.train.labelled and len(task.train) == 5
    whole = Task.from_glue(folder, plain_tokenizer(), train="held", validate="held")
    ids = [each.example_batch(1).inputs["input_ids"].tolist() for each in (task, whole)]
    assert ids[0] == ids[1]
    assert task.describe()["classes"] == whole.describe()["classes"]
    assert len(task_from_dict(line | {"few": {"total": 3}}, base=tmp_path).train) == 3
    with pytest.raises(TaskError, match=r"train: .* no targets.*give validate="):
        task_from_dict(line | {"validate": None}, base=tmp_path)
    for part in ("test", "validate"):
        with pytest.raises(TaskError, match=r"texts.tsv:1: no column .*only training examples "):
            task_from_dict(line | {part: "texts"}, base=tmp_path)
    assert read_glue(folder / "texts.tsv", unlabelled=True)[1] is None


def test_damaged_and_missing_files_are_refused(tmp_path):
    folder = glue_folder(tmp_path, "SST-2", ("train.tsv.gz", "dev.tsv.gz"))
    whole = (folder / "train.tsv.gz").read_bytes()
    for content in (whole[:-12], whole[:20] + b"xxxx" + whole[24:], b"sentence\tlabel\ngood\t1\n"):
        (folder / "train.tsv.gz").write_bytes(content)
        with pytest.raises(TaskError, match=r"train.tsv.gz: cannot be read .*download it again"):
            Task.from_glue(folder, plain_tokenizer())
    (folder / "train.tsv.gz").unlink()
    with pytest.raises(TaskError, match=r"no file for train; .*dev.tsv.gz is there; name one with"):
        Task.from_glue(folder, plain_tokenizer())
    (folder / "train.tsv.gz").write_bytes(whole)
    with pytest.raises(TaskError, match="no file for test; nothing-like-it"):
        Task.from_glue(folder, plain_tokenizer(), test="nothing-like-it")
    with pytest.raises(TaskError, match="no such folder"):
        Task.from_glue(tmp_path / "CoLA", plain_tokenizer())


# -- one file -------------------------------------------------------------------------------------


def read(tmp_path, name, content, file="dev.tsv"):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_glue(folder / file)


def test_line_ends_marks_and_quotes_are_taken_literally(tmp_path):
    content = '\ufeffsentence\tlabel\r\n"good\t1\r\na\u2028b\x85c" \t0\r\n\r\n'
    texts, labels = read(tmp_path, "SST-2", content)
    assert texts == [('"good',), ('a\u2028b\x85c" ',)] and labels == [1, 0]
    # No line feed after the last line.
    assert read(tmp_path, "SST-2", "sentence\tlabel\ngood\t1")[0] == [("good",)]


def test_official_variants_of_columns_are_known(tmp_path):
    official = "index\tsentence1_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
    line = "0\t(a)\tthe film\ta film\tneutral\tentailment\n"
    assert read(tmp_path, "MNLI", official + line) == ([("the film", "a film")], [0])
    bare = "captions\tf\t2012\t1\t3.600\tgood\tbad\ncaptions\tf\t2012\t1\t0\ta\tb\tleft\tright\n"
    assert read(tmp_path, "STS-B", bare) == ([("good", "bad"), ("a", "b")], [3.6, 0.0])


SENTENCE = "sentence\tlabel\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("SST-2", SENTENCE + "good\t1\na\tb\t0\n", r"dev.tsv:3: 3 columns instead of 2 \(a tab"),
        ("SST-2", SENTENCE + "good\t1\n\nbad\t0\n", "dev.tsv:3: 1 columns instead of 2"),
        ("SST-2", SENTENCE + "good\t1\n \t0\n", "dev.tsv:3: an empty text"),
        ("SST-2", SENTENCE + "good\t2\n", "dev.tsv:2: label '2' is not one of 0, 1"),
        ("SST-2", "sentence\tlabl\ngood\t1\n", "dev.tsv:1: no column 'label'"),
        ("SST-2", SENTENCE, "dev.tsv: no example; the file is empty"),
        ("SST-2", "", "dev.tsv:1: no column 'sentence'; the first line is ''"),
        ("SST-2", SENTENCE.encode() + b"good\t1\n\xff\xfe\t0\n", "dev.tsv:3: not UTF-8"),
        ("CoLA", "gj04\t1\t\tgood\ngj04\t1\tgood\n", "dev.tsv:2: 3 columns instead of 4"),
        ("CoLA", "gj04\tx\t\tgood\n", "dev.tsv:1: label 'x' is not one of 0, 1"),
        ("CoLA", "index\tsentence\n0\tgood\n", "dev.tsv:1: no column 'label'"),
        ("RTE", PAIR + "0\ta\tb\t1\n", "dev.tsv:2: label '1' is not one of entailment, not_ent"),
        ("RTE", PAIR + "0\ta\t\tentailment\n", "dev.tsv:2: an empty text"),
        ("RTE", "index\tsentence1\tlabel\n", "dev.tsv:1: no column 'sentence2'"),
        ("STS-B", SCORED + "0\tg\tf\t1\t1\tn\tn\ta\tb\tnan\n", "score 'nan' is not a number from"),
        ("STS-B", SCORED + "0\tg\tf\t1\t1\tn\tn\ta\tb\t5.1\n", "score '5.1' is not a number from"),
        ("STS-B", SCORED + "0\tg\tf\t1\t1\tn\tn\ta\tb\thigh\n", "score 'high' is not a number"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_line(tmp_path, name, content, message):
    with pytest.raises(TaskError, match=message):
        read(tmp_path, name, content)


def test_the_broken_lines_of_the_official_qqp_are_left_out(tmp_path, caplog):
    header, line, _ = FILES["QQP"]
    lines = [line.format(1)] * 300
    lines[100], lines[200] = (
        "7\t8\t9\thalf a question\n",
        line.format(1).replace("was a film bad", ""),
    )
    with caplog.at_level(logging.WARNING):
        texts, labels = read(tmp_path, "QQP", header + "".join(lines))
    assert len(texts) == len(labels) == 298
    assert "2 broken lines are left out" in caplog.text
    lines[:5] = ["7\t8\n"] * 5
    with pytest.raises(TaskError, match=r"dev.tsv:5: 2 columns instead of 6"):
        read(tmp_path, "QQP", header + "".join(lines))


# -- lines of a recipe and of the command line ----------------------------------------------------


def test_a_recipe_names_folder_and_tokenizer(tmp_path):
    glue_folder(tmp_path, "SST-2")
    saved(tmp_path / "bert")
    forms = [
        {"glue": {"path": "SST-2", "tokenizer": "bert", "max_length": 16}},
        {"glue": "SST-2", "tokenizer": "bert", "max_length": 16},
    ]
    one, other = (task_from_dict(form, base=tmp_path) for form in forms)
    lent = task_from_dict(
        {"glue": "SST-2", "max_length": 16}, base=tmp_path, tokenizer=tmp_path / "bert"
    )
    assert one.describe() == other.describe() == lent.describe() and one.name == "SST-2"
    assert one.example_batch().inputs["input_ids"].shape == (1, 16)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"glue": "SST-2"}, "SST-2 needs a tokenizer; name the folder of the model"),
        ({"glue": {}}, "glue: 'path' is missing"),
        ({"glue": "SST-2", "max_len": 16}, "'max_len' is not an option; did you mean 'max_length'"),
        ({"glue": "SST-2", "tokenizer": 3}, "'tokenizer' must be a path, got 3"),
        ({"glue": "SST-2", "tokenizer": "no"}, "no/tokenizer.json is not there|no is not there"),
        ({"glue": "SST-2", "tokenizer": "bert", "max_length": "64"}, "max_length '64' must be"),
    ],
)
def test_a_recipe_line_that_is_wrong_is_refused(tmp_path, spec, message):
    glue_folder(tmp_path, "SST-2")
    saved(tmp_path / "bert")
    with pytest.raises(TaskError, match=message):
        task_from_dict(spec, base=tmp_path)


def test_a_file_reads_texts_by_its_own_tokenizer(tmp_path):
    """On the command line, where ``--task`` names none."""
    folder, file = glue_folder(tmp_path, "SST-2"), tmp_path / "model.safetensors"
    task = Task.from_glue(folder, plain_tokenizer(), max_length=32)
    save(nn.Embedding(4, 2), file, task=task)
    found = task_of(f"{{glue: {folder}, max_length: 32}}", file)
    assert found.describe() == task.describe()
    save(nn.Embedding(4, 2), file)
    with pytest.raises(TaskError, match="needs a tokenizer"):
        task_of(f"{{glue: {folder}}}", file)


# -- the real files -------------------------------------------------------------------------------


# Examples of the official files, and of the subsets kept beside them.
COUNTS = {
    "CoLA": {"train": 8551, "dev": 1043},
    "MNLI": {"train_subset": 19625, "dev_matched": 9815, "dev_mismatched_1000": 1000},
    "MRPC": {"train": 3668, "dev": 408, "msr_paraphrase_test-labeled": 1725},
    "QNLI": {"train_subset": 9999, "dev": 5463},
    "QQP": {"train_subset": 27388, "heldout_subset": 4000},
    "RTE": {"train": 2490, "dev": 277},
    "SST-2": {"train": 67349, "dev": 872, "test-labeled": 1821},
    "STS-B": {"train": 5749, "dev": 1500, "stsbenchmark-test-labeled": 1379},
    "WNLI": {"train": 635, "dev": 71},
}


@pytest.mark.parametrize("name", COUNTS)
def test_real_files_have_their_examples(laconic_data, name):
    folder = laconic_data / "glue" / name
    found = {stem: len(read_glue(folder / f"{stem}.tsv.gz")[0]) for stem in COUNTS[name]}
    assert found == COUNTS[name]


def test_a_real_task_with_a_real_tokenizer(laconic_data):
    source = laconic_data / "encoder_minilm_l6_h384"
    task = Task.from_glue(laconic_data / "glue" / "MRPC", source)
    assert task.describe()["examples"] == {"train": 3485, "validate": 183, "test": 408}
    assert task.test.targets().bincount().tolist() == [129, 279]
    assert wasted(task.train.batches(32, seed=0)) < 0.05 < 0.3 < wasted(task.train.batches(32))
