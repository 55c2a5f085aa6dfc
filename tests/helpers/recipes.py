"""A recipe of nested steps, to be read and edited, and what is said when its text is refused."""

from __future__ import annotations

from typing import Any

import pytest

from laconic.errors import RecipeError
from laconic.recipe import Recipe

LONG = """\
# a comment
model: digits_cnn
task: digits

steps:
  - prune:
      axes: weights
      keep: 0.5
      retrain:
        train:
          epochs: 2
          optimizer:
            adamw:
              lr: 1e-3
              decay: {milestones: {at: [0.5, 0.9]}}
  - quantize: {weight: 4}
  - train
"""


def refused(text: str, **options: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, where="a.yaml", **options)
    return str(caught.value)
