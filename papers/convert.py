"""Convert CIFAR-10 from lossless WebP sheets to one npz file that ``task: {npz: ...}`` reads.

    python papers/convert.py --out scratch/cifar10.npz

The sheets are looked for in the folder cifar10 of LACONIC_DATA, or of ``--data``.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

PARTS = {
    "train": ("cifar10_train_0.npz", "cifar10_train_1.npz"),
    "test": ("cifar10_test.npz",),
}
SIDE = 32


def read_sheets(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [examples, 32, 32, 3] and labels uint8 [examples] of one file.

    The array ``webp`` holds the sheets one after another, ``sizes`` their lengths in bytes, and
    ``order`` the position of each example among the tiles.
    """
    with np.load(path, allow_pickle=False) as archive:
        content, sizes = archive["webp"].tobytes(), archive["sizes"].tolist()
        order, labels = archive["order"], archive["labels"]
    tiles, start = [], 0
    for size in sizes:
        sheet = np.asarray(Image.open(io.BytesIO(content[start : start + size])).convert("RGB"))
        rows, columns = sheet.shape[0] // SIDE, sheet.shape[1] // SIDE
        grid = sheet.reshape(rows, SIDE, columns, SIDE, 3)
        tiles.append(grid.swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3))
        start += size
    return np.concatenate(tiles)[order], labels


def convert(folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays of the npz file: images, labels and the names of the classes."""
    arrays = {}
    for part, names in PARTS.items():
        pairs = [read_sheets(folder / name) for name in names]
        arrays[f"{part}_images"] = np.concatenate([images for images, _ in pairs])
        arrays[f"{part}_labels"] = np.concatenate([labels for _, labels in pairs])
    arrays["classes"] = np.array((folder / "classes.txt").read_text("utf-8").split())
    return arrays


def write(arrays: dict[str, np.ndarray], out: Path, *, compress: bool) -> None:
    """Write an npz file; an interrupted run leaves no half file under its name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial.npz")
    save = np.savez_compressed if compress else np.savez
    save(partial, **arrays)
    partial.replace(out)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the npz file to write")
    parser.add_argument("--data", type=Path, help="folder with cifar10/ (default: LACONIC_DATA)")
    parser.add_argument("--compress", action="store_true", help="smaller and slower")
    options = parser.parse_args(arguments)
    data = options.data or os.environ.get("LACONIC_DATA")
    if not data:
        parser.error("no data folder: set LACONIC_DATA, or give --data FOLDER")
    folder = Path(data) / "cifar10"
    needed = [*sum(PARTS.values(), ()), "classes.txt"]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        parser.error(f"{folder}: {', '.join(missing)} not found; give the folder that has cifar10/")
    try:
        arrays = convert(folder)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        parser.error(f"{folder}: a sheet file is damaged ({error}); copy it again")
    write(arrays, options.out, compress=options.compress)
    sizes = ", ".join(f"{part} {len(arrays[f'{part}_labels']):,}" for part in PARTS)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB, images: {sizes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
