"""Value, Step and State: what a recipe is made of and what it changes."""

from __future__ import annotations

import hashlib
import importlib
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, Self

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import core_schema
from torch import Tensor, nn

from laconic.errors import FieldProblem, LaconicError, RecipeError, RunError, nearest
from laconic.problems import admitted, prefixed, refusal
from laconic.scope import Scope

if TYPE_CHECKING:
    from laconic.tasks import Task
    from laconic.weights.representation import Representation

__all__ = [
    "Count",
    "During",
    "Keeper",
    "Share",
    "State",
    "Step",
    "UpToOne",
    "Value",
    "derive",
    "generator_of",
    "inside",
    "members",
    "run_step",
    "undisturbed",
]

# Fields of many values: a number of things, and how large a part of all, which may be nothing.
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
UpToOne = Annotated[float, Field(ge=0, le=1)]
# Packages whose lazy tables may define a value; the class is imported when it is named.
_PACKAGES = ("structure", "weights", "recover")


def snake(name: str) -> str:
    """Return a class name as it is written in a recipe.

    >>> snake("FixedPoint")
    'fixed_point'
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name).lower()


def derive(seed: int, *keys: object) -> int:
    """Return a 63-bit seed that depends on a seed and every key, and on nothing else.

    >>> derive(0, "prune", 1) == derive(0, "prune", 1) != derive(0, "prune", 2)
    True
    """
    digest = hashlib.sha256(repr((seed, *keys)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_of(seed: int, *keys: object) -> torch.Generator:
    """Return a CPU generator that depends on a seed and the keys, on nothing else.

    >>> generator_of(0, "order").initial_seed() == derive(0, "order")
    True
    """
    return torch.Generator().manual_seed(derive(seed, *keys))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave torch's global generators, of all devices, as a with block found them.

    >>> before = torch.get_rng_state()
    >>> with undisturbed():
    ...     _ = torch.rand(3)
    >>> torch.equal(torch.get_rng_state(), before)
    True
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield


class Value(BaseModel):
    """A frozen, hashable record that prints as the code that makes it.

    A direct subclass that also names ``ABC`` as a base opens a *family* (Step,
    Representation, ...). A field typed with a family accepts a member, or what a recipe
    writes: ``name``, ``{name: fields}`` or ``{name: first positional field}``.
    A member is registered under its class name in snake case by being defined.

    >>> class Window(Value):
    ...     size: int = 3
    >>> Window(size=5), Window() == Window(size=3)
    (Window(size=5), True)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    positional: ClassVar[tuple[str, ...]] = ()
    _registry: ClassVar[dict[type, dict[str, type]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.name = snake(cls.__name__)

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        # Not earlier: another thread must not find a class whose fields are not built yet.
        super().__pydantic_init_subclass__(**options)
        if ABC not in cls.__bases__:
            for family in (base for base in cls.__mro__ if ABC in base.__bases__):
                Value._registry.setdefault(family, {})[cls.name] = cls

    def __init__(self, /, *args: Any, **fields: Any) -> None:
        if args and not self.positional:
            problem = (
                "a value stands there without the name of its field; fields are: "
                f"{', '.join(type(self).model_fields) or 'none'}"
            )
            raise RecipeError(f"{self.name}: {problem}", (FieldProblem((), problem),))
        if len(args) > len(self.positional):
            raise RecipeError(
                f"{type(self).__name__} takes at most {len(self.positional)} positional "
                f"arguments ({', '.join(self.positional)}), got {len(args)}"
            )
        try:
            super().__init__(**dict(zip(self.positional, args, strict=False)), **fields)
        except ValidationError as error:
            raise refusal(type(self), self.name, error) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Python counts True as 1: "epochs: yes" would train once.
        kinds = admitted(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError(f"input should be a number, got {value}")
        return value

    @classmethod
    def understood(cls, value: Any) -> Self:
        """Return what ``coerce`` does, for code that calls it.

        Raises:
            RecipeError: no such member, or its fields are wrong; the nearest name is given.
        """
        try:
            return cls.coerce(value)
        except ValidationError as error:
            raise refusal(cls, snake(cls.__name__), error) from None
        except ValueError as error:
            raise RecipeError(str(error)) from None

    @classmethod
    def coerce(cls, value: Any) -> Self:
        """Return a member of this family from a member or from what a recipe writes.

        Raises:
            ValueError: no such member, or its fields are wrong (pydantic's error, located).
        """
        if isinstance(value, cls):
            return value
        name, fields = _one_key(cls, value)
        member = members(cls).get(name) or _import_member(cls, name)
        try:
            if fields is None:
                return member()
            if isinstance(fields, Mapping):
                return member(**{str(key): value for key, value in fields.items()})
            return member(fields)
        except RecipeError as error:
            problems = error.problems or (FieldProblem((), str(error)),)
            raise prefixed(cls, name, problems) from None

    @classmethod
    def taking(cls, name: str) -> str | None:
        """Return the field that a member of this name is written in; None: there is none."""
        for place, info in cls.model_fields.items():
            kinds = (kind for kind in admitted(info.annotation) if isinstance(kind, type))
            families = (kind for kind in kinds if issubclass(kind, Value) and ABC in kind.__bases__)
            if any(name in members(family, every=True) for family in families):
                return place
        return None

    @classmethod
    def shorthand(cls, value: Any) -> tuple[str, Any] | None:
        """Return (name, fields) for a bare value such as ``8``; None: there is no such form."""
        return None

    def to_data(self) -> Any:
        """Return what a recipe writes for this value: its name, or name and fields."""
        fields = self.model_dump(mode="json", exclude_defaults=True)
        return {self.name: fields} if fields else self.name

    def __repr__(self) -> str:
        shown, bare = [], True
        for key in sorted(type(self).model_fields, key=self._place):
            info, value = type(self).model_fields[key], getattr(self, key)
            if not info.is_required() and value == info.get_default(call_default_factory=True):
                bare = False
                continue
            bare = bare and key in self.positional
            shown.append(repr(value) if bare else f"{key}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _place(self, key: str) -> int:
        return self.positional.index(key) if key in self.positional else len(self.positional)

    __str__ = __repr__

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        # `cls is Step` would not be bound yet while Step itself is being built.
        if ABC not in cls.__bases__:
            return handler(source)
        return core_schema.no_info_plain_validator_function(
            cls.coerce,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: value.to_data()
            ),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        return {"x-family": cls.__name__} if ABC in cls.__bases__ else handler(schema)


def inside(value: Any, kind: type) -> Iterator[Any]:
    """Yield every value of a kind in a value: itself, then those in its fields.

    >>> from laconic.recover import Label, Logits
    >>> [each.name for each in inside((Label() + Logits(2.0),), Label)]
    ['label']
    """
    if isinstance(value, kind):
        yield value
    fields = dict(value).values() if isinstance(value, Value) else ()
    for item in value if isinstance(value, tuple) else fields:
        yield from inside(item, kind)


def members(family: type, *, every: bool = False) -> dict[str, type]:
    """Return the registered members of a family by the name a recipe uses.

    Args:
        family: Step, Representation, ... .
        every: import what the lazy tables offer first.

    >>> from laconic.recover import Decay
    >>> list(members(Decay, every=True))
    ['constant', 'cosine', 'linear', 'milestones']
    """
    if every:
        for module, name in _offered():
            importlib.import_module(module).__getattr__(name)
    return dict(sorted(Value._registry.get(family, {}).items()))


def _offered() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        module = importlib.import_module(f"laconic.{package}")
        yield from ((module.__name__, name) for name in module.__all__ if name[0].isupper())


def _import_member(family: type, name: str) -> type:
    for module, offered in _offered():
        if snake(offered) == name:
            importlib.import_module(module).__getattr__(offered)
    found = members(family).get(name)
    if found is None:
        hint = nearest(name, members(family, every=True))
        raise ValueError(f"no {snake(family.__name__)} is called '{name}'{hint}")
    return found


def _one_key(family: type[Value], value: Any) -> tuple[str, Any]:
    if isinstance(value, str):
        return value, None
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, fields),) = value.items()
        return str(name), fields
    short = family.shorthand(value)
    if short is None:
        kind = snake(family.__name__)
        article = "an" if kind[0] in "aeiou" else "a"
        raise ValueError(
            f"{article} {kind} is written as its name or as one key 'name: fields', got {value!r}"
        )
    return short


class Keeper(Protocol):
    """Keeps where a run stands, so that it can be resumed."""

    def due(self) -> bool:
        """Return whether it is time to write."""

    def write(self, state: State, training: dict[str, Any]) -> None:
        """Write the state and what a training loop needs to continue."""

    def write_part(
        self, state: State, counters: dict[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        """Write what one of several processes needs to continue, until the step is done."""

    def read_part(self, state: State) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what as many processes have written in this step, or nothing."""

    def scratch(self) -> AbstractContextManager[Path]:
        """Return an empty folder of this process, which goes in the end."""


@dataclass
class State:
    """What the steps of a recipe change: the model, and all they may look at.

    Attributes:
        model: the network being compressed; laid weights included.
        task: data, loss and metrics; None where a recipe needs none.
        teacher: frozen networks to learn from; the original where no other was given.
        seed: of the running step; every draw derives from it.
        device: where the model and the batches live.
        precision: "float32", or "bfloat16" for autocast while training.
        recall: bytes that may hold what teachers answered; 0: they answer every batch.
        history: one measurement per finished step.
        curves: losses of the running step, by what was trained.
        keeper: writes checkpoints to the run directory; None: there is none.
        position: where the running loops stand, outermost first.
        saved: the position a resumed run continues from, outermost first.
        training: tensors and counters of the interrupted training loop.

    >>> first, second = (State(nn.Identity(), seed=3).generator("mask") for _ in range(2))
    >>> first.initial_seed() == second.initial_seed()
    True
    """

    model: nn.Module
    task: Task | None = None
    teacher: Sequence[nn.Module] = ()
    seed: int = 0
    device: str = "cpu"
    precision: str = "float32"
    recall: int = 0
    history: list[Any] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    keeper: Keeper | None = None
    position: list[int] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)

    def generator(self, *keys: object) -> torch.Generator:
        """Return a CPU generator that depends on the step's seed and the keys alone."""
        return generator_of(self.seed, *keys)

    def note(self, curve: str, value: float) -> None:
        """Add the loss of an update to a curve of the running step."""
        self.curves.setdefault(curve, []).append(value)

    def checkpoint(self, training: Callable[[], dict[str, Any]] = dict) -> None:
        """Let the run directory keep where the running step stands, when that is due.

        Args:
            training: returns what a training loop needs to continue.
        """
        if self.keeper is not None and self.keeper.due():
            self.keeper.write(self, training())

    def scratch(self) -> AbstractContextManager[Path]:
        """Return an empty folder for what a step keeps on disk, which goes in the end.

        It lies in the run directory, where there is one; else TMPDIR says where.
        """
        return _temporary() if self.keeper is None else self.keeper.scratch()

    def rounds(self, count: int) -> Iterator[int]:
        """Yield the rounds of a loop that may contain training, resuming where it stopped.

        A round that was interrupted is entered again, so what a step does before the
        training inside a round must be idempotent.
        """
        start = self.saved.pop(0) if self.saved else 0
        self.position.append(start)
        for index in range(start, count):
            self.position[-1] = index
            yield index
        self.position.pop()


@contextmanager
def _temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="laconic-") as folder:
        yield Path(folder)


class Step(Value, ABC):
    """One change of a model: a frozen value with one method.

    Attributes:
        scope: which modules the step may change.
    """

    scope: Scope = Scope("*")

    @abstractmethod
    def apply(self, state: State) -> None:
        """Change ``state.model`` in place."""

    def check(self, model: nn.Module, task: Task | None, earlier: tuple[Step, ...] = ()) -> None:
        """Refuse, before any work, what cannot fit the model, the task or the order.

        Args:
            model: the network before the first step, or its outline after the earlier ones.
            task: its data, if the recipe names any.
            earlier: the steps that will have run before this one.

        Raises:
            LaconicError: the scope selects nothing, a task is missing, ...
        """
        self.scope.select(model)

    def outline(self, model: nn.Module, earlier: tuple[Step, ...] = ()) -> nn.Module:
        """Return a network as later steps are checked against it: its modules and their shapes.

        It is the network itself where this step takes away no module that they could name, and
        adds none; else a copy, whose numbers mean nothing. Nothing is changed, and what only data
        decide is left open: the step says how.

        Args:
            model: the network that the step was checked against.
            earlier: the steps that will have run before this one.
        """
        return model

    def represented(self, model: nn.Module) -> list[tuple[Representation, Mapping[str, Tensor]]]:
        """Return what this step lays: representations, each with the weights it may be laid on.

        A weight that has several gets one of them.
        """
        return []

    @property
    def repeats(self) -> int:
        """Return how many times it does, one after the other, what ``abridged`` does once."""
        return 1

    def abridged(self, repeats: int = 1) -> tuple[Step, ...]:
        """Return what is done besides training, as cheap as it can be: sizes come out of it.

        Args:
            repeats: how many times what is repeated is done, at most as often as the step does it;
                a second number tells how long each takes.
        """
        return (self,)


class During(Step, ABC):
    """A step that may also run inside training, after every optimiser step.

    Attributes:
        settled: the share of training after which it changes nothing any more.
    """

    @property
    def settled(self) -> float:
        """Return the progress, 0 to 1, from which the change is complete."""
        return 1.0

    @abstractmethod
    def update(self, state: State, progress: float, *, since: float) -> None:
        """Bring the model to where it should be at this progress, 0 to 1.

        Args:
            state: what is trained.
            progress: share of all updates that are taken.
            since: that share when this was last called; 0 at the first update.
        """


def run_step(step: Step, state: State, *, key: object = 0) -> None:
    """Run one step with draws of its own and leave the global generators as they were.

    Args:
        step: what to do; top-level or nested in another step.
        state: what it changes.
        key: tells this run from others of the same name (a count, a round).

    Raises:
        LaconicError: the step refused; the message names the step.
        RunError: anything else that went wrong inside it, as its cause.

    >>> from laconic.structure import Prune
    >>> state = State(nn.Linear(4, 4))
    >>> run_step(Prune("weights", keep=0.25), state)
    >>> int((state.model.weight != 0).sum())
    4
    """
    outer = state.seed
    state.seed = derive(outer, step.name, key)
    try:
        with undisturbed():
            torch.manual_seed(state.seed)
            step.apply(state)
    except LaconicError:
        raise
    except Exception as error:
        raise RunError(f"{step.name}: {type(error).__name__}: {error}") from error
    finally:
        state.seed = outer
