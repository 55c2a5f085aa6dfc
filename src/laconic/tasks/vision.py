"""Image tasks (digits, MNIST, CIFAR, npz arrays, folders) and batched augmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.errors import TaskError, nearest
from laconic.step import generator_of
from laconic.tasks.files import channels_first, read_cifar, read_folder, read_idx, read_npz
from laconic.tasks.split import Normalize
from laconic.tasks.task import Task

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "IMAGENET",
    "MNIST",
    "PadCropFlip",
    "cifar",
    "crop_padded",
    "digits",
    "flip",
    "images",
    "mnist",
    "npz",
]

# Mean and standard deviation over the pixels of the training images, in 0..1 units.
MNIST = Normalize((0.1307,), (0.3081,))
CIFAR10 = Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100 = Normalize((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGENET = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# In the official order.
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def crop_padded(images: Tensor, rows: Tensor, columns: Tensor, *, pad: int) -> Tensor:
    """Return images shifted by cropping them from a border of zeros.

    Args:
        images: any dtype [batch, channels, height, width].
        rows: first row of each crop in the padded image, 0 to 2 pad [batch].
        columns: first column, 0 to 2 pad [batch]; (pad, pad) returns the image itself.
        pad: width of the border, in pixels.

    >>> crop_padded(torch.ones(1, 1, 2, 2), torch.tensor([0]), torch.tensor([1]), pad=1)
    tensor([[[[0., 0.],
              [1., 1.]]]])
    """
    batch, channels, height, width = images.shape
    padded = F.pad(images, (pad, pad, pad, pad)).flatten()
    tall, wide = height + 2 * pad, width + 2 * pad
    device = images.device
    # Every row of every crop is `width` neighbouring numbers: a view of all such windows and
    # one gather of whole rows is an order of magnitude faster than indexing single pixels.
    planes = torch.arange(batch * channels, device=device).reshape(batch, channels, 1) * tall
    lines = planes + rows.to(device).reshape(batch, 1, 1) + torch.arange(height, device=device)
    starts = lines * wide + columns.to(device).reshape(batch, 1, 1)
    windows = padded.as_strided((len(padded) - width + 1, width), (1, 1))
    return windows.index_select(0, starts.flatten()).reshape(images.shape)


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Return images of which the chosen ones are mirrored left to right.

    Args:
        images: any dtype [batch, channels, height, width].
        chosen: which to mirror, boolean [batch].

    >>> flip(torch.tensor([[[[1, 2]]]]), torch.tensor([True]))
    tensor([[[[2, 1]]]])
    """
    positions = chosen.nonzero()[:, 0].to(images.device)
    return images.index_copy(0, positions, images.index_select(0, positions).flip(-1))


@dataclass(frozen=True)
class PadCropFlip:
    """Pad with zeros, crop at random, mirror at random (He et al. 2016, section 4.2).

    Args:
        pad: width of the border, in pixels; 0: no crop.
        flip: probability of mirroring an image.

    Raises:
        TaskError: a negative pad, or a probability outside 0..1.

    >>> images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    >>> PadCropFlip()(images, torch.Generator()).shape
    torch.Size([2, 3, 32, 32])
    """

    pad: int = 4
    flip: float = 0.5

    def __post_init__(self) -> None:
        whole = isinstance(self.pad, int) and self.pad >= 0
        if not whole or not isinstance(self.flip, int | float) or not 0 <= self.flip <= 1:
            raise TaskError(
                f"augment: pad {self.pad!r} must be a number of pixels and flip {self.flip!r} a "
                "probability from 0 to 1"
            )

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return augmented images [batch, channels, height, width] of the same dtype."""
        if images.ndim != 4:
            raise TaskError(
                f"augment: inputs of shape {list(images.shape)} are not images "
                "[batch, channels, height, width]; leave augment out"
            )
        if self.pad:
            places = torch.randint(0, 2 * self.pad + 1, (2, len(images)), generator=generator)
            images = crop_padded(images, places[0], places[1], pad=self.pad)
        if self.flip:
            images = flip(images, torch.rand(len(images), generator=generator) < self.flip)
        return images


NPZ = {"classes"} | {
    f"{part}_{what}" for part in ("train", "validate", "test") for what in ("images", "labels")
}
AUGMENTATIONS = {
    "pad-crop-flip": PadCropFlip(),
    "pad-crop": PadCropFlip(flip=0.0),
    "flip": PadCropFlip(pad=0),
    "none": None,
}
Augmentation = str | Mapping[str, Any] | PadCropFlip | None


def digits() -> Task:
    """Return scikit-learn's embedded digits: 1,797 images [1, 8, 8], values 0 to 1.

    A fixed fifth (360 images) is the test split.

    >>> digits().example(2)[0].shape
    torch.Size([2, 1, 8, 8])
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).float().div_(16)[:, None]
    labels = torch.from_numpy(bunch.target)
    order = torch.randperm(len(labels), generator=generator_of(0, "digits"))
    test, train = order[:360].sort().values, order[360:].sort().values
    pairs = [(pixels[chosen], labels[chosen]) for chosen in (train, test)]
    return Task.from_arrays(pairs[0], pairs[1], name="digits")


def mnist(
    path: Path,
    *,
    augment: Augmentation = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Task:
    """Return MNIST from its four official idx files, plain or gzipped.

    Args:
        path: folder with train-images-idx3-ubyte and the other three.
        augment: of training images: pad-crop-flip, pad-crop, flip, none, or with numbers of
            your own {pad: 4, flip: 0.5}; see PadCropFlip.
        mean: of the channel, in 0..1 units; the training images' own by default.
        std: of the channel.

    Raises:
        TaskError: a file is missing, unreadable, truncated or of another shape.

    >>> mnist(Path("data/mnist")).main_metric  # doctest: +SKIP
    'accuracy'
    """
    path = Path(path)
    parts = []
    for part in ("train", "t10k"):
        pixels = read_idx(path, f"{part}-images-idx3-ubyte", 3)
        parts.append((pixels[:, None], read_idx(path, f"{part}-labels-idx1-ubyte", 1)))
        if pixels.shape[1:] != parts[0][0].shape[2:]:
            raise TaskError(f"{path}: {part} images are {list(pixels.shape[1:])}, not as in train")
    return Task.from_arrays(
        *parts,
        augment=_augmentation(augment),
        normalize=_normalize(mean, std, MNIST),
        classes=[str(digit) for digit in range(10)],
        name="mnist",
    )


def cifar(
    path: Path,
    *,
    augment: Augmentation = "pad-crop-flip",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Task:
    """Return CIFAR-10 or CIFAR-100 from the official *binary* files.

    Args:
        path: cifar-10-batches-bin, cifar-100-binary, or the folder that holds one of them.
        augment: of training images: pad-crop-flip, pad-crop, flip, none, or with numbers of
            your own {pad: 4, flip: 0.5}; see PadCropFlip.
        mean: of each channel, in 0..1 units; the training images' own by default.
        std: of each channel.

    Raises:
        TaskError: a file is missing, unreadable or truncated. The pickled Python version is
            refused, because reading pickles runs code.

    >>> cifar(Path("data/cifar-10-batches-bin")).classes[0]  # doctest: +SKIP
    'airplane'
    """
    path = Path(path)
    known = (path / name for name in ("cifar-10-batches-bin", "cifar-100-binary"))
    path = next((folder for folder in known if folder.is_dir()), path)
    hundred = (path / "train.bin").exists()
    names = ["train.bin"] if hundred else [f"data_batch_{number}.bin" for number in range(1, 6)]
    train = [read_cifar(path / name, 2 if hundred else 1) for name in names]
    test = read_cifar(path / ("test.bin" if hundred else "test_batch.bin"), 2 if hundred else 1)
    return Task.from_arrays(
        (torch.cat([pixels for pixels, _ in train]), torch.cat([labels for _, labels in train])),
        test,
        augment=_augmentation(augment),
        normalize=_normalize(mean, std, CIFAR100 if hundred else CIFAR10),
        classes=_fine_names(path) if hundred else CIFAR10_CLASSES,
        name="cifar100" if hundred else "cifar10",
    )


def npz(
    path: Path,
    *,
    augment: Augmentation = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Task:
    """Return images from one npz file.

    The arrays are train_images, train_labels, test_images and test_labels; validate_images,
    validate_labels and classes (names of the labels) may be there too, and train_labels may be
    left out where steps need none. Images are uint8 (divided by 255) or floats (taken as they
    are): [n, h, w], [n, h, w, c] or [n, c, h, w], where the last dimension holds the channels if
    its size is 1 or 3.

    Args:
        path: the file.
        augment: of training images: pad-crop-flip, pad-crop, flip, none, or with numbers of
            your own {pad: 4, flip: 0.5}; see PadCropFlip.
        mean: of each channel, in 0..1 units; None: no normalisation.
        std: of each channel.

    Raises:
        TaskError: the file is missing or damaged, or an array is missing or misshapen.

    >>> npz(Path("data/cifar10.npz"), augment="pad-crop-flip").name  # doctest: +SKIP
    'cifar10'
    """
    path = Path(path)
    arrays = read_npz(path)
    pairs = {
        part: _npz_pair(path, arrays, part)
        for part in ("train", "test", "validate")
        if part != "validate" or "validate_images" in arrays
    }
    _check_validated(path, pairs, "validate_images and validate_labels, or train_labels")
    shapes = {part: list(pair[0].shape[1:]) for part, pair in pairs.items()}
    if any(shape != shapes["train"] for shape in shapes.values()):
        raise TaskError(f"{path}: images differ in shape: {shapes}; store one shape")
    floats = {part: pair[0].is_floating_point() for part, pair in pairs.items()}
    if len(set(floats.values())) > 1:
        kinds = {part: "floats" if each else "uint8" for part, each in floats.items()}
        raise TaskError(
            f"{path}: images differ in kind: {kinds}; store one, as uint8 is divided by 255 and "
            "floats are not"
        )
    return Task.from_arrays(
        **pairs,
        augment=_augmentation(augment),
        normalize=_normalize(mean, std, None),
        classes=arrays["classes"].tolist() if "classes" in arrays else None,
        name=path.stem,
    )


def images(
    path: Path,
    *,
    size: int | None = None,
    augment: Augmentation = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Task:
    """Return the images of the folders train/ and test/, one sub-folder per class.

    A folder validate/ may be there too. Where steps need no labels, train/ may hold the images
    itself. All images are read into memory as RGB.

    Args:
        path: holds train/ and test/.
        size: scale and centre-crop to size x size pixels; None: the images have one size.
        augment: of training images: pad-crop-flip, pad-crop, flip, none, or with numbers of
            your own {pad: 4, flip: 0.5}; see PadCropFlip.
        mean: of each channel, in 0..1 units; ImageNet's by default.
        std: of each channel.

    Raises:
        TaskError: a folder is missing or empty, a class of test is not in train, an image cannot
            be read or has another size.
        MissingExtra: Pillow is not installed.

    >>> images(Path("data/flowers"), size=64).classes  # doctest: +SKIP
    ('daisy', 'tulip')
    """
    path = Path(path)
    if size is not None and (not isinstance(size, int) or size < 1):
        raise TaskError(f"images: size {size!r} must be a number of pixels above 0")
    pixels, labels, classes = read_folder(path / "train", size, None, unlabelled=True)
    pairs = {"train": (pixels, labels)}
    for part in ("test", "validate"):
        if part == "test" or (path / part).is_dir():
            other, wanted, classes = read_folder(path / part, size, classes)
            if other.shape[1:] != pixels.shape[1:]:
                raise TaskError(
                    f"{path}: images of {part} are {list(other.shape[1:])}, those of train "
                    f"{list(pixels.shape[1:])}; give size= to scale them"
                )
            pairs[part] = (other, wanted)
    _check_validated(path, pairs, "a folder validate/ with one sub-folder of images per class")
    return Task.from_arrays(
        **pairs,
        augment=_augmentation(augment),
        normalize=_normalize(mean, std, IMAGENET),
        classes=classes,
        name=path.name,
    )


def _check_validated(path: Path, pairs: Mapping[str, tuple[Tensor, Any]], wanted: str) -> None:
    """Refuse training images without labels where no others tell the best checkpoint."""
    if pairs["train"][1] is None and "validate" not in pairs:
        raise TaskError(
            f"{path}: the images of train have no labels, so none can be held out to choose the "
            f"best checkpoint; add {wanted}"
        )


def _augmentation(value: Augmentation) -> PadCropFlip | None:
    if value is None or isinstance(value, PadCropFlip):
        return value
    if isinstance(value, Mapping):
        known = [field.name for field in fields(PadCropFlip)]
        for name in value:
            if name not in known:
                raise TaskError(f"augment: '{name}' is not an option{nearest(str(name), known)}")
        return PadCropFlip(**value)
    if value not in AUGMENTATIONS:
        hint = nearest(str(value), AUGMENTATIONS)
        raise TaskError(f"augment: no augmentation is called {value!r}{hint}")
    return AUGMENTATIONS[value]


def _normalize(
    mean: Sequence[float] | None, std: Sequence[float] | None, default: Normalize | None
) -> Normalize | None:
    if mean is None and std is None:
        return default
    if mean is None or std is None:
        raise TaskError(f"mean is {mean} and std is {std}; give both or neither")
    try:
        return Normalize(mean, std)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TaskError(f"mean {mean!r} and std {std!r} must be lists of numbers") from error


def _npz_pair(path: Path, arrays: Mapping[str, Any], part: str) -> tuple[Tensor, Any]:
    names = [f"{part}_images", f"{part}_labels"]
    if part == "train" and arrays.keys() <= NPZ - {names[1]}:  # no other name, mistyped perhaps
        names.pop()
    for name in names:
        if name not in arrays:
            hint = nearest(name, arrays)
            raise TaskError(f"{path}: the array '{name}' is missing{hint}")
    try:
        pixels = channels_first(arrays[names[0]], names[0])
    except TaskError as error:
        raise TaskError(f"{path}: {error}") from error
    if len(names) == 1:
        return pixels, None
    labels = arrays[names[1]]
    if labels.ndim != 1 and labels.shape != (len(labels), 1):
        raise TaskError(f"{path}: {part}_labels have shape {list(labels.shape)}; store [n]")
    return pixels, labels.reshape(-1)


def _fine_names(path: Path) -> list[str]:
    file = path / "fine_label_names.txt"
    names = file.read_text("utf-8").split() if file.exists() else []
    return names if len(names) == 100 else [str(label) for label in range(100)]
