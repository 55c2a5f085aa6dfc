"""Task: the data, the call, the loss and the metrics of one problem."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import logging
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.errors import TaskError, nearest
from laconic.own import explained
from laconic.step import generator_of
from laconic.tasks.checks import check_classes, check_labels, check_loss, check_targets
from laconic.tasks.loader import Loader, as_split
from laconic.tasks.metrics import Metric, accuracy, as_values
from laconic.tasks.split import (
    Augment,
    Batch,
    Split,
    as_arrays,
    as_batch,
    required,
    tensors_in,
)

__all__ = [
    "Task",
    "call_model",
    "cross_entropy",
    "device_of",
    "evaluation",
    "full_precision",
    "hold_out",
    "labelled",
    "needed",
    "squared_error",
]

logger = logging.getLogger(__name__)

SPLITS = ("train", "validate", "test")
# Which text of a pair a token belongs to: not every text model distinguishes them.
OPTIONAL = "token_type_ids"


def call_model(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's outputs for a batch: the inputs decide how it is called.

    Of a mapping that the model returns, such as those of transformers, the "logits" count.
    The named input token_type_ids is left out for a model whose forward does not take it.

    >>> call_model(nn.Identity(), Batch((torch.ones(1),)))
    tensor([1.])
    """
    if isinstance(batch.inputs, Mapping):
        outputs = model(**_accepted(model, batch.inputs))
    elif isinstance(batch.inputs, (tuple, list)):
        outputs = model(*batch.inputs)
    else:
        outputs = model(batch.inputs)
    if isinstance(outputs, Mapping) and "logits" in outputs:
        outputs = outputs["logits"]
    return typing.cast(Tensor, outputs)


def cross_entropy(outputs: Tensor, batch: Batch) -> Tensor:
    """Return the mean cross entropy, in nats, of outputs [batch, classes] and labels [batch].

    >>> cross_entropy(torch.zeros(1, 2), Batch((), torch.tensor([0])))
    tensor(0.6931)
    """
    return F.cross_entropy(outputs, required(batch.targets))


def squared_error(outputs: Tensor, batch: Batch) -> Tensor:
    """Return the mean squared error of outputs [batch, 1] and values [batch].

    Outputs may be [batch] too.

    Raises:
        TaskError: there is not one output for each value.

    >>> squared_error(torch.tensor([[1.0], [2.0]]), Batch((), torch.tensor([0.0, 4.0])))
    tensor(2.5000)
    """
    targets = required(batch.targets)
    return F.mse_loss(as_values(outputs, targets), targets)


class Task:
    """What a network is for: data, how a batch becomes a call, loss and metrics.

    Each split is a DataLoader, a pair (inputs, targets) of tensors or arrays, or a Split. That of
    training may be without targets, inputs alone, for steps that need none: they learn from the
    teacher's answers, or only look at what flows through the network. The targets of its batches
    are None, and steps that read them are refused before any work.

    Args:
        train: examples to learn from.
        test: examples only looked at to report.
        validate: examples that choose the best checkpoint; None: 5 % of ``train``, never
            augmented and always the same ones (see hold_out). Needed where ``train`` has no
            targets.
        call: (model, batch) -> outputs; by default ``model(*inputs)``.
        loss: (outputs, batch) -> mean over the batch, a scalar; cross entropy by default.
        metrics: name -> function of (outputs, targets) of a whole split; the first one decides
            which checkpoint is best, so higher must be better. Accuracy, 0 to 1, by default.
        classes: names of the labels; None: "0", "1", ... up to the largest label in ``train``
            and ``validate``.
        name: what the data are called in runs and reports.
        tokenizer: what turned texts into the inputs, as the bytes of a tokenizer.json; it
            travels in the artefact, as the names of the labels do.

    Raises:
        TaskError: data are empty, misshapen, not finite or without targets, labels are out of
            range, or ``loss`` takes something else.

    >>> task = Task((torch.rand(40, 2), torch.arange(40) % 2), (torch.rand(4, 2), [0, 1, 0, 1]))
    >>> len(task.train), len(task.validate), sorted(task.score(nn.Linear(2, 2)))
    (38, 2, ['accuracy', 'loss'])
    """

    def __init__(
        self,
        train: Any,
        test: Any,
        validate: Any = None,
        *,
        call: Callable[[nn.Module, Batch], Tensor] = call_model,
        loss: Callable[[Tensor, Batch], Tensor] = cross_entropy,
        metrics: Mapping[str, Metric] | None = None,
        classes: Sequence[str] | None = None,
        name: str = "task",
        tokenizer: bytes | None = None,
    ) -> None:
        given = {"train": train, "test": test, "validate": validate}
        parts = {key: as_split(part, key) for key, part in given.items() if part is not None}
        self.call, self.loss, self.name, self.tokenizer = call, loss, name, tokenizer
        metrics = {"accuracy": accuracy} if metrics is None else metrics
        if not isinstance(metrics, Mapping) or not metrics:
            raise TaskError(
                f"{name}: metrics are {metrics!r}; give name -> function, the main one first"
            )
        self.metrics = dict(metrics)
        check_loss(loss, name)
        check_targets(parts)
        self.classes = tuple(str(label) for label in classes or ())
        self.drawn: tuple[int, ...] | None = None
        self._told: set[tuple[str, int]] = set()
        if loss is cross_entropy or self.classes:
            self.classes = check_labels(parts, self.classes)
        self.train, self.test = parts["train"], parts["test"].plain()
        if "validate" in parts:
            self.validate = parts["validate"].plain()
        else:
            self.train, self.validate = hold_out(self.train)

    @classmethod
    def from_arrays(
        cls,
        train: Any,
        test: Any,
        validate: Any = None,
        *,
        augment: Augment | None = None,
        normalize: Any = None,
        **options: Any,
    ) -> Task:
        """Return a Task over pairs (inputs, targets) in memory.

        Inputs are an array, or a mapping of arrays for a network with named inputs. Instead of a
        pair there may be one mapping, with the targets under "labels" or "label".

        Args:
            train: inputs [examples, ...], images uint8 [examples, channels, height, width], and
                targets [examples]; or an array of inputs alone.
            test: the same, with targets.
            validate: the same, with targets; None: 5 % of ``train``.
            augment: of training batches; see Arrays.
            normalize: (mean, std) per channel in 0..1 units; see Arrays.
            **options: what Task takes besides.

        >>> images = torch.zeros(20, 3, 8, 8, dtype=torch.uint8)
        >>> pair = (images, torch.arange(20) % 10)
        >>> Task.from_arrays(pair, pair, normalize=((0.5,) * 3, (0.25,) * 3)).image["std"]
        [0.25, 0.25, 0.25]
        """
        given = {"train": train, "test": test, "validate": validate}
        splits: dict[str, Any] = {
            name: _named(name, as_arrays, pair, augment=augment, normalize=normalize)
            for name, pair in given.items()
            if pair is not None
        }
        return cls(**splits, **options)

    @classmethod
    def from_loaders(
        cls,
        train: Any,
        test: Any,
        validate: Any = None,
        *,
        read: Callable[[Any], Batch] = as_batch,
        **options: Any,
    ) -> Task:
        """Return a Task over the user's own DataLoaders.

        Args:
            train: a DataLoader; its batches may be inputs alone.
            test: a DataLoader.
            validate: a DataLoader; None: 5 % of the training data set.
            read: from what the loaders yield to a Batch (see laconic.tasks.split.as_batch).
            **options: what Task takes besides.

        >>> data = torch.utils.data.TensorDataset(torch.rand(40, 2), torch.arange(40) % 2)
        >>> loader = torch.utils.data.DataLoader(data, batch_size=8)
        >>> len(Task.from_loaders(loader, loader).train)
        38
        """
        given = {"train": train, "test": test, "validate": validate}
        splits: dict[str, Any] = {
            name: _named(name, Loader, loader, read=read)
            for name, loader in given.items()
            if loader is not None
        }
        return cls(**splits, **options)

    @classmethod
    def from_texts(
        cls, train: Any, test: Any, tokenizer: Any, *, max_length: int = 128, **options: Any
    ) -> Task:
        """Return a Task over texts: named inputs, padded to the longest of each batch.

        Each split is a list of (text, label) or (text, second text, label), or a table with
        named columns: a mapping of lists, a list of mappings, a data set of Hugging Face, a data
        frame. Labels are names, whole numbers from 0, or other numbers; those are values, trained
        with the squared error and judged by Pearson's and Spearman's correlation.

        Args:
            train: examples to learn from; without labels: texts, pairs of them where the
                examples of ``test`` are pairs, or a table without the label's column.
            test: examples only looked at to report.
            tokenizer: a folder of Hugging Face or its tokenizer.json, a ``tokenizers.Tokenizer``,
                or a fast tokenizer of transformers.
            max_length: tokens of one example, special ones included.
            **options: ``validate`` (5 % of ``train`` by default, where that has labels);
                ``columns``, names of the text columns and, last, of the label; ``padding``
                ("longest" or "max_length") and ``multiple`` (1) as in
                laconic.tasks.as_tokenizer; and what Task takes besides.

        Raises:
            TaskError: texts are empty or no texts, labels unknown or not finite, columns missing.
            MissingExtra: tokenizers is not installed.

        >>> rows = [("a fine film", 1), ("a dull film", 0)]
        >>> Task.from_texts(rows, rows, "path/to/bert", max_length=64)  # doctest: +SKIP
        """
        from laconic.tasks.text import texts

        return texts(train, test, tokenizer, max_length=max_length, **options)

    @classmethod
    def from_glue(
        cls, folder: str | Path, tokenizer: Any, *, max_length: int = 128, **options: Any
    ) -> Task:
        """Return a task of GLUE from its folder, with its official labels and metrics.

        Args:
            folder: holds train.tsv and dev.tsv, or those gzipped; its name is the task's.
            tokenizer: as in from_texts.
            max_length: tokens of one example, special ones included.
            **options: ``name``, ``train``, ``test``, ``validate``, ``classes``, ``padding`` and
                ``multiple`` as in laconic.tasks.glue.

        Raises:
            TaskError: a file is missing, damaged or not that of the task.
            MissingExtra: tokenizers is not installed.

        >>> Task.from_glue("glue/SST-2", "path/to/bert", max_length=64).classes  # doctest: +SKIP
        ('0', '1')
        """
        from laconic.tasks.text import glue

        return glue(Path(folder), tokenizer=tokenizer, max_length=max_length, **options)

    @property
    def main_metric(self) -> str:
        """Return the name of the metric that decides."""
        return next(iter(self.metrics))

    @property
    def image(self) -> dict[str, list[float]] | None:
        """Return mean and standard deviation of the input channels, in 0..1 units."""
        normalize = self.train.normalize
        if normalize is None:
            return None
        return {"mean": list(normalize.mean), "std": list(normalize.std)}

    def split(self, name: str) -> Split:
        """Return the split of a name.

        Raises:
            TaskError: there is no such split.
        """
        if name not in SPLITS:
            raise TaskError(f"a task has no split '{name}'{nearest(name, SPLITS)}")
        chosen: Split = getattr(self, name)
        return chosen

    def score(
        self,
        model: nn.Module,
        split: str = "test",
        *,
        batch: int = 256,
        device: str | torch.device | None = None,
    ) -> dict[str, float]:
        """Return every metric on a split, and the mean loss under "loss".

        The model runs in evaluation mode, without gradients and autocast; afterwards every
        module is in the mode it was in. Outputs are compared in float32.

        Args:
            model: is not moved.
            split: "train", "validate" or "test"; not augmented.
            batch: examples per call.
            device: where the batches go; None: where the model's first parameter is.

        Raises:
            TaskError: no such split, no targets, outputs that are not one tensor, or fewer than
                classes; the network, the loss or a metric failed, as its cause.
        """
        part, where = self.split(split), torch.device(device or device_of(model))
        if not part.labelled:
            raise TaskError(f"{split}: the examples have no targets; score another split")
        outputs, targets, total, count = [], [], 0.0, 0
        with full_precision(model):
            for piece in part.any_order(batch, device=where):
                answer = self._outputs(model, piece)
                total += self._loss(answer, piece) * len(answer)
                count += len(answer)
                outputs.append(answer)
                targets.append(required(piece.targets))
        everything, truth = _together(outputs, targets, self.name)
        scores = {}
        for name, metric in self.metrics.items():
            with explained(
                f"{self.name}: metric '{name}' failed",
                "it is called with the outputs and the targets of all examples, for one number",
            ):
                scores[name] = float(metric(everything, truth))
        return scores | {"loss": total / count}

    def _outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the outputs for a batch in float32, or say why there are none."""
        given = list(tensors_in(batch.inputs))
        shapes = ", ".join(f"{[*tensor.shape]} {tensor.dtype}" for tensor in given)
        advice = "give data that fit it, or the task call=(model, batch) -> outputs"
        with explained(
            f"{self.name}: the network cannot be called with inputs {shapes}",
            _other_numbers(model, batch) or advice,
        ):
            answer = self.call(model, batch)
        if not isinstance(answer, Tensor):
            raise TaskError(
                f"{self.name}: the model returns {type(answer).__name__}, not a tensor; "
                "give the task call=lambda model, batch: the tensor of outputs"
            )
        if self.loss is cross_entropy and answer.ndim > 1 and self.classes:
            self._compare(answer.shape[1], model)
        return answer.float()

    def _compare(self, outputs: int, model: nn.Module) -> None:
        """Refuse a network with fewer outputs than classes; say once where it has more."""
        network, classes = type(model).__name__, len(self.classes)
        if outputs < classes:
            raise TaskError(
                f"{network} has {outputs} outputs and {self.name} has {classes} classes; give the "
                "network an output for each"
            )
        if outputs > classes and (network, outputs) not in self._told:
            self._told.add((network, outputs))
            logger.warning(
                "%s has %d outputs and %s has %d classes, so some outputs are never right; if "
                "labels are missing, give classes= with every label",
                *(network, outputs, self.name, classes),
            )

    def _loss(self, outputs: Tensor, batch: Batch) -> float:
        if self.loss is cross_entropy:
            check_classes(self.name, outputs, required(batch.targets))
        with explained(
            f"{self.name}: the loss of outputs {[*outputs.shape]} failed",
            "it is called with the outputs and the Batch, for their mean, one number",
        ):
            return float(self.loss(outputs, batch))

    def few(self, per_class: int | None = None, total: int | None = None, *, seed: int = 0) -> Task:
        """Return a Task that trains on few examples; validate and test stay.

        The examples are drawn once by seed, and a larger draw contains a smaller one of the
        same seed; ``drawn`` holds their positions in ``train``.

        Args:
            per_class: so many of each class, or
            total: so many altogether.
            seed: of the draw.

        Raises:
            TaskError: both or neither given, there are not so many examples, or there are no
                classes: the targets are values, or there are none.

        >>> task = Task((torch.rand(40, 2), torch.arange(40) % 2), (torch.rand(2, 2), [0, 1]))
        >>> task.few(per_class=3).train.targets().bincount()
        tensor([3, 3])
        """
        if (per_class is None) == (total is None):
            raise TaskError("few takes either per_class= or total=; give one of them")
        if total is not None:
            drawn = _draw(
                torch.arange(self.train.choosable), total, generator_of(seed, "few"), "train"
            )
        else:
            if not self.train.labelled:
                raise TaskError("few: train has no targets to choose classes by; give total=")
            labels = self.train.targets()
            if labels.is_floating_point():
                raise TaskError(f"{self.name}: values have no classes to draw from; give total=")
            wanted = range(len(self.classes)) if self.classes else sorted(set(labels.tolist()))
            drawn = [
                position
                for label in wanted
                for position in _draw(
                    (labels == label).nonzero()[:, 0],
                    per_class or 0,
                    generator_of(seed, "few", label),
                    f"class {label} of train",
                )
            ]
        smaller = copy.copy(self)
        smaller.drawn = tuple(sorted(drawn))
        smaller.train = self.train.subset(smaller.drawn)
        return smaller

    def example_batch(self, count: int = 1) -> Batch:
        """Return the first ``count`` examples of ``train``, not augmented.

        Texts are padded to the longest they may be, for which costs are stated.
        """
        return self.train.example(count)

    def example(self, count: int = 1) -> tuple[Any, ...]:
        """Return example inputs as positional arguments of the model.

        Raises:
            TaskError: the inputs are named; use example_batch and ``call``.
        """
        inputs = self.example_batch(count).inputs
        if isinstance(inputs, Mapping):
            raise TaskError(
                f"{self.name}: inputs are named ({', '.join(inputs)}); use "
                "task.call(model, task.example_batch(n))"
            )
        return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)

    def check(self, model: nn.Module) -> None:
        """Refuse a network that the examples cannot be fed to, as far as it says.

        Raises:
            TaskError: it knows fewer tokens, has places for fewer, has other classes, or weights
                in another precision than the inputs, which it does not convert.
        """
        config: Any = getattr(model, "config", None)
        outputs = getattr(config, "num_labels", None)
        names = tuple(str(name) for name in (getattr(config, "id2label", None) or {}).values())
        if names != self.classes and sorted(names) == sorted(self.classes) != []:
            raise TaskError(
                f"{type(model).__name__} puts its classes in the order {', '.join(names)} and "
                f"{self.name} in another; give classes: [{', '.join(names)}]"
            )
        if self.classes and outputs not in (None, len(self.classes)):
            raise TaskError(
                f"{type(model).__name__} has {outputs} outputs and {self.name} has "
                f"{len(self.classes)} classes; load it with num_labels: {len(self.classes)}"
            )
        for name in SPLITS:
            self.split(name).check(model)
        batch = self.example_batch().to(device_of(model))
        if _other_numbers(model, batch):
            with full_precision(model):
                self._outputs(model, batch)  # some networks convert what they are given

    def describe(self) -> dict[str, Any]:
        """Return what a run records of this task: JSON-able, without the data."""
        own = self.tokenizer
        return {
            "name": self.name,
            "examples": {name: len(self.split(name)) for name in SPLITS},
            "metrics": list(self.metrics),
            "classes": list(self.classes),
            "image": self.image,
            "tokenizer": None if own is None else hashlib.sha256(own).hexdigest(),
            "drawn": None if self.drawn is None else list(self.drawn),
        }


def hold_out(train: Split, *, seed: int = 0) -> tuple[Split, Split]:
    """Return a split without 5 % of its examples, and those 5 %, not augmented.

    Raises:
        TaskError: fewer than two examples, or examples that cannot be chosen.

    >>> from laconic.tasks import Arrays
    >>> rest, held = hold_out(Arrays(torch.zeros(100, 1), torch.zeros(100)))
    >>> len(rest), len(held)
    (95, 5)
    """
    count = train.choosable
    if count < 2:
        raise TaskError(f"train: {count} example cannot be divided; give validate= or more of them")
    order = torch.randperm(count, generator=generator_of(seed, "validate"))
    held = max(1, round(0.05 * count))
    chosen, rest = order[:held].sort().values, order[held:].sort().values
    return train.subset(rest.tolist()), train.subset(chosen.tolist()).plain()


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Run a with block in evaluation mode without gradients; restore every mode.

    Laid weights are decoded once for the block, so nothing inside may change a parameter.

    >>> model = nn.Dropout()
    >>> with evaluation(model):
    ...     model.training
    False
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), parametrize.cached():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Run a with block in evaluation mode, in the weights' own precision.

    >>> model = nn.Linear(1, 1)
    >>> with torch.autocast("cpu", torch.bfloat16), full_precision(model):
    ...     model(torch.ones(1, 1)).dtype
    torch.float32
    """
    with evaluation(model), torch.autocast(device_of(model).type, enabled=False):
        yield


def device_of(model: nn.Module) -> torch.device:
    """Return where a network computes: where its first parameter is.

    >>> device_of(nn.Linear(1, 1))
    device(type='cpu')
    """
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _accepted(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the named inputs without token_type_ids if the model has no such parameter."""
    known = inspect.signature(model.forward).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known)
    if takes_any or any(parameter.name == OPTIONAL for parameter in known):
        return inputs
    return {name: value for name, value in inputs.items() if name != OPTIONAL}


def _named(name: str, make: Callable[..., Split], given: Any, **options: Any) -> Split:
    """Return the split that is made of what was given; say which one it is where that fails."""
    try:
        return make(given, **options)
    except TaskError as error:
        raise TaskError(f"{name}: {error}") from error


def _together(
    outputs: Sequence[Tensor], targets: Sequence[Tensor], name: str
) -> tuple[Tensor, Tensor]:
    """Return those of all batches, token by token where batches are of different lengths."""
    shapes = {part.shape[1:] for part in outputs}
    if len(shapes) > 1:
        if any(out.shape[:-1] != true.shape for out, true in zip(outputs, targets, strict=True)):
            shown = " and ".join(str([*shape]) for shape in [*shapes][:2])
            raise TaskError(
                f"{name}: outputs of examples that differ in shape, such as {shown}, cannot be "
                "scored together; give targets for every token, [batch, tokens], or pad all "
                "batches to one length"
            )
        outputs = [part.flatten(0, -2) for part in outputs]
        targets = [part.flatten() for part in targets]
    return torch.cat([*outputs]), torch.cat([*targets])


def _draw(positions: Tensor, count: int, generator: torch.Generator, where: str) -> list[int]:
    if not 1 <= count <= len(positions):
        advice = f"ask for 1 to {len(positions)}" if len(positions) else "give total="
        raise TaskError(
            f"{count} examples of {where} were asked for; there are {len(positions)}: {advice}"
        )
    order = torch.randperm(len(positions), generator=generator)
    drawn: list[int] = positions[order[:count].to(positions.device)].tolist()
    return drawn


def needed(task: Task | None, why: str) -> Task:
    """Return the task that something needs.

    Args:
        task: of a state, or None.
        why: what needs it, for what.

    Raises:
        TaskError: there is none.
    """
    if task is None:
        raise TaskError(f"{why}, and there is no task; add a 'task:' line, or give task=")
    return task


def labelled(task: Task | None, why: str, instead: str) -> Task:
    """Return the task whose training examples have targets, which something reads.

    Args:
        task: of a state, or None.
        why: what reads them, for what.
        instead: what to take where there are none.

    Raises:
        TaskError: there is no task, or its training examples have no targets.

    >>> pair = (torch.zeros(40, 2), torch.arange(40) % 2)
    >>> labelled(Task(pair, pair), "train reads labels", "learn from logits").name
    'task'
    """
    found = needed(task, why)
    if not found.train.labelled:
        raise TaskError(
            f"{why}, and the training examples of {found.name} have no targets; give some that "
            f"have, or {instead}"
        )
    return found


def _other_numbers(model: nn.Module, batch: Batch) -> str:
    """Return what to do where weights and inputs are floats of other kinds, or nothing."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    given = {each.dtype for each in tensors_in(batch.inputs) if each.is_floating_point()}
    if own is None or not given or own in given:
        return ""
    kinds = ", ".join(sorted(_word(each) for each in given))
    remedy = "call model.float()" if torch.float32 in given else f"make them {_word(own)}"
    return f"the network's weights are {_word(own)} and the inputs {kinds}: {remedy}, or give call="


def _word(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")
