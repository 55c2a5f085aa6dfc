"""A folder for hostile files, for the modules that ask for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from helpers.hostile import FOLDER, small_file, sound


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let hostile files lie in a folder, and forget those that were read from it."""
    FOLDER.append(tmp_path_factory.mktemp("hostile"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sound()  # what reading a file imports is no memory that a hostile one asks for
    yield
    FOLDER.clear()
    small_file.cache_clear()
    sound.cache_clear()
