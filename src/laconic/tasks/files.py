"""Readers of image files: idx, CIFAR's binary batches, npz arrays, folders of images."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laconic.errors import MissingExtra, TaskError, few
from laconic.progress import progress

__all__ = ["channels_first", "read_cifar", "read_folder", "read_idx", "read_npz"]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
CIFAR_IMAGE = (3, 32, 32)
DEEP = ("I", "F")  # Pillow's modes of 32 bits; those of 16 begin with I;16


def read_idx(folder: Path, name: str, dimensions: int) -> Tensor:
    """Return the array of an idx file, plain or gzipped, uint8 [examples, ...].

    Args:
        folder: holds the file.
        name: of the file, without ``.gz``.
        dimensions: 3 for images [examples, height, width], 1 for labels [examples].

    Raises:
        TaskError: the file is missing, unreadable, truncated, or holds something else.
    """
    path = next((file for file in (folder / name, folder / f"{name}.gz") if file.exists()), None)
    if path is None:
        raise TaskError(f"{folder}: neither {name} nor {name}.gz is there; put the file there")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
            shape = [
                int.from_bytes(header[place : place + 4], "big")
                for place in range(4, len(header), 4)
            ]
            # One byte more than promised shows that a file is too long, whatever its length.
            body = file.read(math.prod(shape) + 1)
    except (OSError, EOFError, zlib.error, MemoryError, OverflowError) as error:
        raise TaskError(f"{path}: cannot be read ({error}); download it again") from error
    if header[:4] != bytes((0, 0, 8, dimensions)) or len(shape) != dimensions:
        raise TaskError(
            f"{path}: not an idx file of bytes with {dimensions} dimensions "
            f"(it begins with {header[:4].hex()}); give the official file"
        )
    if len(body) != math.prod(shape) or not body:
        amount = "more" if len(body) > math.prod(shape) else len(body)
        raise TaskError(
            f"{path}: the header promises {shape}, {math.prod(shape)} bytes, and {amount} are "
            "there; download it again"
        )
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).reshape(shape)


def read_cifar(path: Path, label_bytes: int) -> tuple[Tensor, Tensor]:
    """Return images and labels of one binary CIFAR file.

    Args:
        path: the file: records of label bytes and 3,072 bytes of image.
        label_bytes: 1 for CIFAR-10; 2 for CIFAR-100, whose fine label is the second.

    Returns:
        Images uint8 [examples, 3, 32, 32] and labels int64 [examples].

    Raises:
        TaskError: the file is missing, unreadable or truncated.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TaskError(
            f"{path}: cannot be read ({error.strerror}); the official *binary* version is "
            "needed (the pickled Python version is refused, because pickles run code)"
        ) from error
    record = label_bytes + math.prod(CIFAR_IMAGE)
    if not content or len(content) % record:
        raise TaskError(
            f"{path}: {len(content)} bytes are not whole records of {record} bytes; "
            "the file is truncated or of another kind: download it again"
        )
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, record)
    return rows[:, label_bytes:].reshape(-1, *CIFAR_IMAGE), rows[:, label_bytes - 1].long()


def read_npz(path: Path) -> Mapping[str, np.ndarray[Any, Any]]:
    """Return every array of an npz file; pickled arrays are refused.

    Raises:
        TaskError: the file is missing, damaged, or holds Python objects.
    """
    if not path.is_file():
        raise TaskError(f"{path}: no such file; give the path of an npz file")
    if not zipfile.is_zipfile(path):
        raise TaskError(f"{path}: not an npz file, or a truncated one; write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError) as error:
        raise TaskError(
            f"{path}: cannot be read as npz ({error}); write it with numpy.savez, plain arrays only"
        ) from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise TaskError(f"{path}: the npz file is damaged ({error}); write it again") from error


def channels_first(images: np.ndarray[Any, Any], name: str) -> Tensor:
    """Return images [examples, channels, height, width] from either layout.

    The rule: three dimensions are grey images; with four, the last dimension holds the channels
    if its size is 1 or 3, otherwise the second one does if its size is 1 or 3.

    Args:
        images: uint8 or float [n, h, w], [n, h, w, c] or [n, c, h, w].
        name: of the array, for messages.

    Raises:
        TaskError: any other shape or kind of number.

    >>> channels_first(np.zeros((5, 32, 32, 3), np.uint8), "train_images").shape
    torch.Size([5, 3, 32, 32])
    """
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise TaskError(f"{name} are {images.dtype}; store uint8 (0 to 255) or floats")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    elif images.ndim != 4 or images.shape[1] not in (1, 3):
        raise TaskError(
            f"{name} have shape {list(images.shape)}; store [n, h, w], [n, h, w, c] or "
            "[n, c, h, w] with 1 or 3 channels"
        )
    return torch.from_numpy(np.ascontiguousarray(images))


def read_folder(
    folder: Path, size: int | None, classes: tuple[str, ...] | None, *, unlabelled: bool = False
) -> tuple[Tensor, Tensor | None, tuple[str, ...] | None]:
    """Return the images of a folder with one sub-folder per class.

    Args:
        folder: its sub-folders, in alphabetical order, are the classes.
        size: images become size x size pixels, by scaling and a centre crop; None: all images
            must be of one size already.
        classes: the sub-folders that may be there; None: any.
        unlabelled: the folder may hold the images itself, which then have no labels.

    Returns:
        Images uint8 [examples, 3, height, width], labels int64 [examples] and the names of the
        classes; without labels None, and the classes as they were given.

    Raises:
        TaskError: no such folder, no class, no image, images inside and outside of sub-folders,
            an unreadable or misshapen image.
        MissingExtra: Pillow is not installed.
    """
    if not folder.is_dir():
        raise TaskError(
            f"{folder}: no such folder; it must hold one sub-folder of images per class"
        )
    children = (child for child in folder.iterdir() if child.is_dir())
    found = tuple(sorted(each.name for each in children if not each.name.startswith(".")))
    loose = _pictures(folder)
    if loose and not found and unlabelled:
        return _stacked(folder, loose, size), None, classes
    names = classes or found
    unknown = sorted(set(found) - set(names))
    if unknown or not found:
        wrong = (
            f"'{unknown[0]}' is not one of the classes ({few(names, 4)})"
            if unknown
            else "there is no sub-folder"
        )
        raise TaskError(f"{folder}: {wrong}; make one sub-folder per class")
    if loose:
        raise TaskError(
            f"{folder}: {loose[0].name} lies beside the sub-folders of classes; move it into one"
        )
    empty = [] if classes else [name for name in names if not _pictures(folder / name)]
    if empty and empty != list(names):
        raise TaskError(
            f"{folder / empty[0]}: no image ({', '.join(SUFFIXES)}) of this class; add some, or "
            "remove the folder"
        )
    files = [(label, path) for label, name in enumerate(names) for path in _pictures(folder / name)]
    if not files:
        raise TaskError(f"{folder}: no image ({', '.join(SUFFIXES)}) in its sub-folders; add some")
    pixels = _stacked(folder, [path for _, path in files], size)
    return pixels, torch.tensor([label for label, _ in files]), names


def _stacked(folder: Path, files: list[Path], size: int | None) -> Tensor:
    """Return images of one size, uint8 [examples, 3, height, width]."""
    pixels = [_pixels(path, size) for path in progress(files, f"read {folder.name}")]
    for path, image in zip(files, pixels, strict=True):
        if image.shape != pixels[0].shape:
            raise TaskError(
                f"{path}: {image.shape[1]} x {image.shape[0]} pixels, but {files[0].name} has "
                f"{pixels[0].shape[1]} x {pixels[0].shape[0]}; give size= to scale them"
            )
    return channels_first(np.stack(pixels), str(folder))


def _pictures(folder: Path) -> list[Path]:
    shown = (path for path in folder.glob("*") if not path.name.startswith("."))
    return sorted(path for path in shown if path.suffix.lower() in SUFFIXES)


def _pixels(path: Path, size: int | None) -> np.ndarray[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingExtra("Pillow", "vision") from error
    try:
        with Image.open(path) as image:
            if image.mode in DEEP or image.mode.startswith("I;16"):
                raise TaskError(
                    f"{path}: a pixel has more than 8 bits (mode {image.mode}), which would become "
                    "white; store the images in an npz file, as floats"
                )
            colour = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise TaskError(f"{path}: cannot be read as an image ({error}); remove it") from error
    if size is not None:
        colour = ImageOps.fit(colour, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(colour)
