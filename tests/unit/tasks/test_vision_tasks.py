"""Image tasks: readers, their refusals, and augmentation against slow references."""

from __future__ import annotations

import gzip
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch

from laconic.errors import TaskError
from laconic.tasks import cifar, digits, images, mnist, npz
from laconic.tasks.files import channels_first, read_idx
from laconic.tasks.vision import CIFAR10, IMAGENET, PadCropFlip, crop_padded, flip


def pixels(count=6, channels=3, height=8, width=8):
    generator = torch.Generator().manual_seed(1)
    shape = (count, channels, height, width)
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


@pytest.mark.parametrize(("channels", "height", "width", "pad"), [(3, 8, 8, 2), (1, 5, 9, 4)])
def test_crop_padded_equals_a_loop_over_images(channels, height, width, pad):
    given = pixels(9, channels, height, width)
    generator = torch.Generator().manual_seed(2)
    rows, columns = torch.randint(0, 2 * pad + 1, (2, 9), generator=generator)
    padded = torch.nn.functional.pad(given, (pad,) * 4)
    expected = torch.stack(
        [
            image[:, row : row + height, column : column + width]
            for image, row, column in zip(padded, rows, columns, strict=True)
        ]
    )
    result = crop_padded(given, rows, columns, pad=pad)
    assert result.dtype == torch.uint8 and torch.equal(result, expected)
    corners = torch.tensor([0, 2 * pad, pad])
    rows, columns = corners.repeat(3), corners.repeat_interleave(3)
    assert torch.equal(crop_padded(given, rows, columns, pad=pad)[8], given[8])


def test_flip_mirrors_the_chosen_images_and_no_other():
    given = pixels()
    chosen = torch.tensor([True, False, True, False, False, False])
    result = flip(given, chosen)
    assert torch.equal(result[[0, 2]], given[[0, 2]].flip(-1))
    assert torch.equal(result[~chosen], given[~chosen])
    assert torch.equal(given, pixels())


def test_augmentation_is_uniform_over_offsets_and_fair_over_flips():
    given = torch.zeros(4000, 1, 3, 3, dtype=torch.uint8)
    given[:, 0, 1, 0] = 255
    result = PadCropFlip(pad=1)(given, torch.Generator().manual_seed(0))[:, 0]
    counts = (result > 0).float().mean(dim=0)
    # Three rows are equally likely. Of three column offsets one moves the pixel out, one leaves
    # it on the edge (left or, mirrored, right), one in the middle. Four standard deviations of
    # 4,000 draws are below 0.022.
    expected = torch.tensor([0.5, 1.0, 0.5]).repeat(3, 1) / 9
    torch.testing.assert_close(counts, expected, atol=0.022, rtol=0)


def test_augmentation_options():
    generator = torch.Generator().manual_seed(0)
    given = pixels()
    assert torch.equal(PadCropFlip(pad=0, flip=0.0)(given, generator), given)
    assert torch.equal(PadCropFlip(pad=0, flip=1.0)(given, generator), given.flip(-1))
    with pytest.raises(TaskError, match="are not images"):
        PadCropFlip()(torch.zeros(3, 4), generator)
    for wrong in ({"pad": -1}, {"pad": 1.5}, {"flip": 1.5}, {"flip": "often"}):
        with pytest.raises(TaskError, match="must be a number of pixels"):
            PadCropFlip(**wrong)


def test_digits_are_whole_and_fixed():
    task = digits()
    assert task.describe()["examples"] == {"train": 1365, "validate": 72, "test": 360}
    (inputs,) = task.example(4)
    assert inputs.shape == (4, 1, 8, 8) and inputs.min() >= 0 and inputs.max() == 1
    assert task.classes == tuple("0123456789")
    # The split is part of every published figure on the digits: it may never change.
    assert task.test.targets()[:12].tolist() == FIRST_TEST_LABELS
    assert torch.equal(task.test.targets(), digits().test.targets())


FIRST_TEST_LABELS = [4, 4, 0, 5, 6, 6, 8, 5, 2, 3, 3, 3]


def write_idx(folder, name, array, *, packed=False, cut=0, extra=b""):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.tobytes()
    content = content[: len(content) - cut] + extra
    if packed:
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    else:
        (folder / name).write_bytes(content)


def write_mnist(folder, *, packed=False, **options):
    for part, count in (("train", 30), ("t10k", 10)):
        grey = np.arange(count * 16, dtype=np.uint8).reshape(count, 4, 4)
        labels = (np.arange(count) % 10).astype(np.uint8)
        write_idx(folder, f"{part}-images-idx3-ubyte", grey, packed=packed)
        write_idx(folder, f"{part}-labels-idx1-ubyte", labels, packed=packed, **options)


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_reads_idx_plain_or_packed(tmp_path, packed):
    write_mnist(tmp_path, packed=packed)
    task = mnist(tmp_path, augment="pad-crop")
    assert task.describe()["examples"] == {"train": 28, "validate": 2, "test": 10}
    batch = next(task.test.batches(10))
    expected = (torch.arange(160).to(torch.uint8).float() / 255 - 0.1307) / 0.3081
    assert torch.equal(batch.inputs[0], expected.reshape(10, 1, 4, 4))
    assert batch.targets.tolist() == list(range(10))
    assert task.train.augment == PadCropFlip(flip=0.0)


def test_idx_refuses_what_is_missing_cut_or_something_else(tmp_path):
    array = np.zeros((5, 4, 4), np.uint8)
    with pytest.raises(TaskError, match=r"neither a nor a\.gz is there"):
        read_idx(tmp_path, "a", 3)
    write_idx(tmp_path, "a", array, cut=1)
    with pytest.raises(TaskError, match=r"promises \[5, 4, 4\], 80 bytes, and 79 are there"):
        read_idx(tmp_path, "a", 3)
    write_idx(tmp_path, "a", array, extra=b"x")
    with pytest.raises(TaskError, match="80 bytes, and more are there"):
        read_idx(tmp_path, "a", 3)
    with pytest.raises(TaskError, match="not an idx file of bytes with 1 dimensions"):
        read_idx(tmp_path, "a", 1)
    write_idx(tmp_path, "empty", np.zeros((0, 4, 4), np.uint8))
    with pytest.raises(TaskError, match=r"promises \[0, 4, 4\]"):
        read_idx(tmp_path, "empty", 3)
    write_idx(tmp_path, "b", array, packed=True)
    packed = (tmp_path / "b.gz").read_bytes()
    for wrong in (packed[:-12], b"not gzip", packed[:20] + b"\xff" * 8 + packed[28:]):
        (tmp_path / "b.gz").write_bytes(wrong)
        with pytest.raises(TaskError, match=r"b\.gz: cannot be read"):
            read_idx(tmp_path, "b", 3)
    huge = struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**31, 2**31)
    (tmp_path / "huge").write_bytes(huge)
    with pytest.raises(TaskError, match="huge: "):
        read_idx(tmp_path, "huge", 3)


def test_mnist_refuses_other_lengths_and_shapes(tmp_path):
    write_mnist(tmp_path)
    write_idx(tmp_path, "train-labels-idx1-ubyte", np.zeros(29, np.uint8))
    with pytest.raises(TaskError, match="train: there are 30 inputs and 29 targets"):
        mnist(tmp_path)
    write_idx(tmp_path, "train-labels-idx1-ubyte", np.full(30, 10, np.uint8))
    with pytest.raises(
        TaskError, match=r"label 10 \(example 0\) is out of range; labels are 0 to 9"
    ):
        mnist(tmp_path)
    write_idx(tmp_path, "t10k-images-idx3-ubyte", np.zeros((10, 5, 4), np.uint8))
    with pytest.raises(TaskError, match=r"t10k images are \[5, 4\], not as in train"):
        mnist(tmp_path)


def write_cifar(folder, *, hundred=False):
    folder.mkdir(exist_ok=True)
    names = ["train.bin"] if hundred else [f"data_batch_{number}.bin" for number in range(1, 6)]
    for number, name in enumerate([*names, "test.bin" if hundred else "test_batch.bin"]):
        labels = np.stack([np.full(10, 19), np.arange(10) + number], 1)[:, 0 if hundred else 1 :]
        body = pixels(10, 3, 32, 32).numpy().reshape(10, -1)
        rows = np.concatenate([labels.astype(np.uint8) % 100 % (100 if hundred else 10), body], 1)
        (folder / name).write_bytes(rows.tobytes())


@pytest.mark.parametrize("hundred", [False, True])
def test_cifar_reads_the_binary_version(tmp_path, hundred):
    folder = tmp_path / ("cifar-100-binary" if hundred else "cifar-10-batches-bin")
    write_cifar(folder, hundred=hundred)
    task = cifar(tmp_path)
    assert task.name == ("cifar100" if hundred else "cifar10")
    assert len(task.classes) == (100 if hundred else 10)
    assert len(task.train) + len(task.validate) == (10 if hundred else 50)
    first = 1 if hundred else 5
    expected = [(first + example) % (100 if hundred else 10) for example in range(10)]
    assert task.test.targets().tolist() == expected
    assert torch.equal(task.test.inputs, pixels(10, 3, 32, 32))
    assert task.train.augment == PadCropFlip() and task.test.augment is None


def test_cifar_refuses_pickles_and_cut_files(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": b""}))
    with pytest.raises(TaskError, match=r"data_batch_1\.bin: cannot be read .*binary.*pickles run"):
        cifar(tmp_path)
    write_cifar(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TaskError, match=r"data_batch_3\.bin: 30729 bytes are not whole records"):
        cifar(tmp_path)


def arrays(**changes):
    colour = pixels(20).permute(0, 2, 3, 1).numpy()
    labels = np.arange(20) % 4
    every = {
        "train_images": colour,
        "train_labels": labels,
        "test_images": colour,
        "test_labels": labels[:, None],
        "classes": np.array(["a", "b", "c", "d"]),
    }
    return {name: value for name, value in (every | changes).items() if value is not None}


def test_npz_reads_both_layouts(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, **arrays())
    task = npz(path, augment={"pad": 2, "flip": 0}, mean=CIFAR10.mean, std=CIFAR10.std)
    assert task.classes == ("a", "b", "c", "d")
    assert task.train.augment == PadCropFlip(2, 0)
    assert task.image == {"mean": list(CIFAR10.mean), "std": list(CIFAR10.std)}
    assert torch.equal(task.test.inputs, pixels(20))
    first = pixels(20).numpy()
    np.savez(path, **arrays(train_images=first, validate_images=first, validate_labels=[0] * 20))
    assert len(npz(path).validate) == 20 and torch.equal(npz(path).train.inputs, pixels(20))


def test_training_images_of_an_npz_may_be_without_labels(tmp_path):
    path = tmp_path / "d.npz"
    held = {"validate_images": pixels(20).numpy(), "validate_labels": [0, 1] * 10}
    np.savez(path, **arrays(train_labels=None, **held))
    task = npz(path, augment="flip", mean=CIFAR10.mean, std=CIFAR10.std)
    assert not task.train.labelled and torch.equal(task.train.inputs, pixels(20))
    assert task.classes == ("a", "b", "c", "d") and len(task.few(total=7).train) == 7
    np.savez(path, **arrays(train_labels=None, train_label=np.arange(20) % 4, **held))
    with pytest.raises(TaskError, match="'train_labels' is missing; did you mean 'train_label'"):
        npz(path)


def test_the_layout_rule():
    assert channels_first(np.zeros((2, 4, 5), np.uint8), "x").shape == (2, 1, 4, 5)
    assert channels_first(np.zeros((2, 4, 5, 1), np.uint8), "x").shape == (2, 1, 4, 5)
    assert channels_first(np.zeros((2, 3, 5, 6), np.float32), "x").shape == (2, 3, 5, 6)
    assert channels_first(np.zeros((2, 3, 5, 3), np.uint8), "x").shape == (2, 3, 3, 5)
    with pytest.raises(TaskError, match=r"x have shape \[2, 4, 5, 6\]"):
        channels_first(np.zeros((2, 4, 5, 6), np.uint8), "x")
    with pytest.raises(TaskError, match="x are int64; store uint8"):
        channels_first(np.zeros((2, 4, 5), np.int64), "x")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"test_labels": None}, {}, "the array 'test_labels' is missing"),
        ({"train_labels": None}, {}, "train have no labels.*add validate_images"),
        ({"train_labels": np.arange(19)}, {}, "train: there are 20 inputs and 19 targets"),
        ({"train_labels": np.arange(20) / 20}, {}, "train: labels are torch.float32"),
        ({"train_labels": np.eye(20)}, {}, r"train_labels have shape \[20, 20\]"),
        ({"test_images": np.zeros((20, 9, 9, 3), np.uint8)}, {}, "images differ in shape"),
        ({"test_images": np.zeros((20, 8, 8, 3))}, {}, "in kind: .*'test': 'floats'"),
        ({"test_images": np.array([object()] * 20)}, {}, "cannot be read as npz.*plain arrays"),
        (
            {"train_images": np.full((20, 8, 8, 3), np.nan), "test_images": np.ones((20, 8, 8, 3))},
            {},
            "train: inputs hold 3840 NaN",
        ),
        ({}, {"augment": "crop"}, "no augmentation is called 'crop'; did you mean"),
        ({}, {"augment": {"padd": 1}}, "'padd' is not an option; did you mean 'pad'"),
        ({}, {"mean": [0.5]}, "give both or neither"),
        ({}, {"mean": ["x"], "std": [1]}, "must be lists of numbers"),
        ({}, {"mean": [0.5] * 2, "std": [1] * 2}, "normalize has 2 values"),
    ],
)
def test_npz_refuses(tmp_path, changes, options, message):
    np.savez(tmp_path / "d.npz", **arrays(**changes))
    with pytest.raises(TaskError, match=message):
        npz(tmp_path / "d.npz", **options)


def test_npz_refuses_damaged_files(tmp_path):
    path = tmp_path / "d.npz"
    np.savez_compressed(path, **arrays())
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = content[:middle] + bytes(64) + content[middle + 64 :]
    for wrong in (b"", b"text", content[:-40], content[:middle], damaged):
        path.write_bytes(wrong)
        with pytest.raises(TaskError, match=r"d\.npz: "):
            npz(path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(TaskError, match=r"one\.npy: not an npz file"):
        npz(tmp_path / "one.npy")


@pytest.fixture
def folder(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    for part in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(4):
                flat = np.full((6, 8, 3), 100 * label + number, np.uint8)
                pillow.fromarray(flat).save(tmp_path / part / name / f"{number}.png")
    return tmp_path


def test_images_take_their_classes_from_folders(folder):
    task = images(folder)
    assert task.classes == ("cat", "dog") and task.image["mean"] == list(IMAGENET.mean)
    assert task.test.targets().tolist() == [0] * 4 + [1] * 4
    assert task.test.inputs[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 100, 101, 102, 103]
    assert task.test.inputs.shape == (8, 3, 6, 8)
    assert images(folder, size=4).example(1)[0].shape == (1, 3, 4, 4)


def test_training_images_of_a_folder_may_be_without_labels(folder):
    shutil.copytree(folder / "test", folder / "validate")
    for number, file in enumerate(sorted((folder / "train").glob("*/*.png"))):
        file.rename(folder / "train" / f"{number}.png")
    with pytest.raises(TaskError, match=r"train: 0\.png lies beside the sub-folders"):
        images(folder)
    for name in ("cat", "dog"):
        (folder / "train" / name).rmdir()
    task = images(folder)
    assert not task.train.labelled and task.test.targets().tolist() == [0] * 4 + [1] * 4
    assert task.classes == ("cat", "dog")
    assert task.train.inputs[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 100, 101, 102, 103]
    (folder / "validate").rename(folder / "kept")
    with pytest.raises(TaskError, match=r"train have no labels.*add a folder validate/"):
        images(folder)
    (folder / "kept").rename(folder / "validate")
    (folder / "validate" / "cow").mkdir()
    with pytest.raises(TaskError, match=r"validate: 'cow' is not one of the classes"):
        images(folder)


def test_what_is_hidden_is_no_class_and_no_image(folder):
    before = images(folder)
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    shutil.copy(folder / "train" / "cat" / "0.png", folder / "train" / ".hidden.png")
    shutil.copy(folder / "train" / "cat" / "0.png", folder / "train" / "cat" / "._0.png")
    after = images(folder)
    assert after.classes == ("cat", "dog") and len(after.train) == len(before.train)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_images_of_more_than_eight_bits_are_refused(folder, kind):
    from PIL import Image

    path = folder / "train" / "cat" / "0.png"
    image = Image.fromarray(np.full((6, 8), 300, kind))
    image.save(path, format="PNG" if kind is np.uint16 else "TIFF")
    with pytest.raises(TaskError, match=r"0\.png: a pixel has more than 8 bits.*npz"):
        images(folder)


def test_a_class_without_images_is_refused_in_training(folder):
    for image in (folder / "test" / "dog").iterdir():
        image.unlink()
    assert images(folder).classes == ("cat", "dog")
    (folder / "train" / "emu").mkdir()
    with pytest.raises(TaskError, match=r"train/emu: no image .* of this class; add some"):
        images(folder)


def test_images_refuse(folder):
    from PIL import Image

    with pytest.raises(TaskError, match=r"none.train: no such folder"):
        images(folder / "none")
    with pytest.raises(TaskError, match="size 0 must be a number of pixels"):
        images(folder, size=0)
    Image.new("RGB", (7, 7)).save(folder / "train" / "dog" / "9.png")
    with pytest.raises(TaskError, match=r"9\.png: 7 x 7 pixels, but 0\.png has 8 x 6; give size="):
        images(folder)
    (folder / "train" / "dog" / "9.png").write_bytes(b"no image")
    with pytest.raises(TaskError, match=r"9\.png: cannot be read as an image"):
        images(folder)
    (folder / "train" / "dog" / "9.png").unlink()
    (folder / "test" / "cow").mkdir()
    with pytest.raises(TaskError, match=r"'cow' is not one of the classes \(cat, dog\)"):
        images(folder)
    (folder / "test" / "cow").rmdir()
    (folder / "test" / "cat" / "0.png").rename(folder / "test" / "0.png")
    with pytest.raises(TaskError, match=r"0\.png lies beside the sub-folders of classes"):
        images(folder)
    for name in ("cat", "dog"):
        shutil.rmtree(folder / "test" / name)
    with pytest.raises(TaskError, match="test: there is no sub-folder"):
        images(folder)
    (folder / "empty" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(TaskError, match="no image"):
        images(folder / "empty")
