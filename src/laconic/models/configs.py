"""Classes of transformers and their configurations as data, checked before use."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from laconic.errors import MissingExtra, ModelError, nearest
from laconic.models.layers import MISFIT, shown

__all__ = [
    "CLASSES",
    "Class",
    "as_data",
    "check_config",
    "class_name",
    "class_of",
    "config_of",
    "described",
    "field_names",
    "known_fields",
    "misfit",
    "package",
    "quiet",
    "reason_of",
]

# A class of transformers, which need not be installed where types are checked.
Class = Any

# What configurations call a family -> how the names of its classes begin.
TEXTS = {
    "albert": "Albert",
    "bert": "Bert",
    "camembert": "Camembert",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "mobilebert": "MobileBert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
}
IMAGES = {
    "convnext": "ConvNext",
    "deit": "DeiT",
    "mobilenet_v2": "MobileNetV2",
    "resnet": "ResNet",
    "vit": "ViT",
}
# The task of an option -> how the names of its classes end; the first is the default.
TEXT_TASKS = {
    "sequence-classification": "ForSequenceClassification",
    "base": "Model",
    "masked-lm": "ForMaskedLM",
    "multiple-choice": "ForMultipleChoice",
    "question-answering": "ForQuestionAnswering",
    "token-classification": "ForTokenClassification",
}
IMAGE_TASKS = {"image-classification": "ForImageClassification", "base": "Model"}
CLASSES: frozenset[str] = frozenset(
    prefix + suffix
    for prefixes, suffixes in ((TEXTS, TEXT_TASKS), (IMAGES, IMAGE_TASKS))
    for prefix in prefixes.values()
    for suffix in suffixes.values()
)
ATTENTIONS = ("eager", "sdpa")

# Inclusive bounds of what a file may ask for. First what a constructor repeats or holds in
# memory before the file has shown that it has as many numbers.
BOUNDS: dict[str, tuple[float, float]] = {
    "depths": (1, 48),
    "inner_group_num": (1, 4),
    "max_position_embeddings": (1, 1 << 17),
    "n_heads": (1, 1024),
    "n_layers": (1, 64),
    "num_attention_heads": (1, 1024),
    "num_feedforward_networks": (1, 8),
    "num_hidden_groups": (1, 16),
    "num_hidden_layers": (1, 64),
    "num_labels": (1, 100_000),
    "num_stages": (1, 8),
}
LARGEST, MOST_STAGES, LONGEST_WORD, LONGEST_LABEL = 1 << 22, 8, 64, 512
# Fields of every configuration that say nothing of the network, or repeat something.
LEFT_OUT = {
    *("architectures", "chunk_size_feed_forward", "dtype", "label2id", "output_hidden_states"),
    *("return_dict", "transformers_version"),
}
# What families read from a configuration besides its fields.
MORE = {"attn_implementation", "head_dim", "num_labels"}
# A configuration that makes a constructor compute numbers that the file holds anyway.
NEVER = {"sinusoidal_pos_embds": False}
SHOWN, LONGEST_REASON = 80, 240


def class_name(folder: Path, data: Mapping[str, Any], task: str | None) -> str:
    """Return the class for the configuration in a folder and a task; None: classification.

    Raises:
        ModelError: no family of the list, or no task of this family.
    """
    family = str(data.get("model_type"))[:SHOWN]
    tasks = IMAGE_TASKS if family in IMAGES else TEXT_TASKS
    prefix = {**TEXTS, **IMAGES}.get(family)
    if prefix is None:
        raise ModelError(
            f"{folder}: networks of the type '{family}' are not known"
            f"{nearest(family, [*TEXTS, *IMAGES])}; load it yourself and give it to compress()"
        )
    if task is None:
        return prefix + next(iter(tasks.values()))
    if task not in tasks:
        raise ModelError(f"task '{task}' is not one of '{family}'{nearest(str(task), tasks)}")
    return prefix + tasks[task]


def class_of(name: str) -> Class:
    """Return a class of transformers by its name."""
    return getattr(package("transformers", "hf"), name)


def package(name: str, extra: str) -> Any:
    """Return an optional package.

    Args:
        name: of the package.
        extra: of laconic that installs it.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingExtra(name, extra) from None


def field_names(kind: Class) -> set[str]:
    """Return what a configuration may hold."""
    fields = {field.name for field in dataclasses.fields(kind.config_class)}
    return {name for name in fields - LEFT_OUT if not name.startswith("_")} | MORE


def known_fields(kind: Class, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a class reads of the configuration in a folder."""
    aliases, names = kind.config_class.attribute_map, field_names(kind)
    named = {aliases.get(key, key): value for key, value in data.items()}
    return {key: value for key, value in named.items() if key in names}


def config_of(kind: Class, data: dict[str, Any]) -> Any:
    """Return the configuration of a class from data.

    Raises:
        ModelError: a value is out of bounds, of another kind, or does not fit the others.
    """
    check_config(data)
    labels = data.get("id2label")
    if labels is not None:
        labels = {int(key): labels[key] for key in sorted(labels, key=int)}
        data = {key: value for key, value in data.items() if key != "num_labels"}
        data |= {"id2label": labels, "label2id": {name: key for key, name in labels.items()}}
    never = {key: value for key, value in NEVER.items() if key in data}
    with misfit(kind.__name__), quiet():
        return kind.config_class(**{**data, **never})


def as_data(config: Any) -> dict[str, Any]:
    """Return a whole configuration as JSON-able data."""
    base = package("transformers", "hf").PreTrainedConfig
    common = {field.name: field.default for field in dataclasses.fields(base)}
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in LEFT_OUT and not field.name.startswith("_")
    }
    labels = values.pop("id2label") or {}
    # Those that every configuration has matter only where they are not as usual.
    found = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
        if key not in common or value != common[key]
    }
    if labels == {place: f"LABEL_{place}" for place in range(len(labels))}:
        found["num_labels"] = len(labels)
    else:
        found["id2label"] = {str(place): name for place, name in labels.items()}
    found |= {key: value for key, value in vars(config).items() if key == "head_dim"}
    chosen = config._attn_implementation
    # Kernels that only some machines have compute the same as sdpa.
    found["attn_implementation"] = chosen if chosen in ATTENTIONS else "sdpa"
    return found


def described(kind: Class, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return class and configuration, what is as usual apart: its defaults may change."""
    usual = {field.name: field.default for field in dataclasses.fields(kind.config_class)}
    plain = {key: list(item) if isinstance(item, tuple) else item for key, item in usual.items()}
    same = {key for key, value in data.items() if key in plain and plain[key] == value}
    return {
        "class": kind.__name__,
        "config": {key: value for key, value in data.items() if key not in same},
        "defaults": {key: value for key, value in data.items() if key in same},
    }


def check_config(data: Mapping[str, Any]) -> None:
    """Refuse a configuration with values that no network has.

    Raises:
        ModelError: names the field.
    """
    for key, value in data.items():
        if key == "id2label":
            _check_labels(value)
        elif key == "attn_implementation":
            if value not in ATTENTIONS:
                raise ModelError(f"attention {shown(value)} is none of {list(ATTENTIONS)}")
        elif not (isinstance(value, list) and len(value) <= MOST_STAGES):
            _check_value(key, value)
        else:
            for item in value:
                _check_value(key, item)


def _check_value(key: str, value: Any) -> None:
    low, high = BOUNDS.get(key, (-LARGEST, LARGEST))
    if type(value) in (int, float):
        fits = low <= value <= high
    else:
        fits = value is None or type(value) is bool
        fits = fits or (isinstance(value, str) and len(value) <= LONGEST_WORD)
    if not fits or (key in BOUNDS and type(value) is not int and value is not None):
        raise ModelError(
            f"the configuration's {key[:SHOWN]} {shown(value)} is out of bounds ({low} to {high}) "
            "or of another kind"
        )


def _check_labels(labels: Any) -> None:
    if labels is None:
        return
    count = len(labels) if isinstance(labels, Mapping) else 0
    low, high = BOUNDS["num_labels"]
    if not low <= count <= high or {str(key) for key in labels} != set(map(str, range(count))):
        raise ModelError(f"id2label {shown(labels)} does not name the classes 0, 1, ...")
    for name in labels.values():
        if not isinstance(name, str) or len(name) > LONGEST_LABEL:
            raise ModelError(f"the label {shown(name)} is no short text")


@contextlib.contextmanager
def misfit(name: str) -> Iterator[None]:
    """Turn what transformers says of a configuration into a ModelError."""
    strict = package("huggingface_hub", "hf").errors.StrictDataclassError
    try:
        yield
    except (*MISFIT, strict) as error:
        raise ModelError(
            f"{name} cannot be built from its configuration: {reason_of(error)}"
        ) from error


def reason_of(error: Exception) -> str:
    """Return what an error of another package says, in one short line."""
    return " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from writing to the terminal."""
    theirs = package("transformers", "hf").utils.logging
    before, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(before)
        if bars:
            theirs.enable_progress_bar()
