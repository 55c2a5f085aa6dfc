"""Recipe: a list of steps, read from and written to YAML."""

from __future__ import annotations

import contextlib
import difflib
import functools
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import yaml
from pydantic import WithJsonSchema, field_validator
from torch import nn

from laconic.budget import Budget, bytes_of
from laconic.errors import BudgetError, FieldProblem, LaconicError, RecipeError, nearest
from laconic.problems import read_yaml
from laconic.step import Step, Value, members

if TYPE_CHECKING:
    from laconic.tasks import Task

__all__ = ["Recipe", "families", "find_recipe", "located", "schema", "shipped_recipes"]

# How one teacher, or a list of several, is written.
SPEC = {"type": ["object", "string"]}
TEACHERS = {"anyOf": [SPEC, {"type": "array", "items": SPEC}, {"type": "null"}], "default": None}


class Recipe(Value):
    """Steps in order, and what they are run on.

    Attributes:
        steps: what is done, first to last.
        budget: upper limits of the result.
        seed: every draw of every step derives from it.
        precision: "bfloat16" runs training forwards under autocast, "auto" does where the
            processor multiplies bfloat16 fast; evaluation is always float32.
        model: one key: where the network comes from.
        task: one key: where the data come from, or a function that makes them. Texts are read by
            the tokenizer in the folder of ``model: {hf: folder}`` where no other is named.
        teacher: as ``model``, or a list of such: what objectives learn from; None: the network
            before the first step.
        recall: memory such as "2 GB" for what teachers answered. They answer every training
            example once, at the start of a training of several epochs, if examples are not
            augmented and the answers fit; else every batch.

    >>> from laconic.structure import Prune
    >>> Recipe([Prune("weights", keep=0.5)]) + Recipe([Prune("weights", keep=0.1)])
    Recipe((Prune('weights', keep=0.5), Prune('weights', keep=0.1)))
    """

    positional: ClassVar[tuple[str, ...]] = ("steps",)

    steps: tuple[Step, ...]
    budget: Budget | None = None
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    model: dict[str, Any] | str | None = None
    task: dict[str, Any] | str | None = None
    teacher: Annotated[tuple[dict[str, Any] | str, ...] | None, WithJsonSchema(TEACHERS)] = None
    recall: str | None = None

    @functools.cached_property
    def places(self) -> tuple[str, ...]:
        """Return file and line of every step, where they were read from one."""
        return ()

    @field_validator("teacher", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (str, Mapping)) else value

    @field_validator("recall")
    @classmethod
    def _amount(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                bytes_of(value)
        except BudgetError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("model", "task", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if value is None or isinstance(value, (str, Mapping)):
            return value
        raise ValueError(f"write a name, or one key 'name: options', got {value!r}")

    def __add__(self, other: Recipe) -> Recipe:
        """Return this recipe followed by the steps of another."""
        return self.model_copy(update={"steps": self.steps + other.steps})

    def __hash__(self) -> int:
        return hash((self.steps, self.seed))  # what it is run on may be dicts, in any order

    @classmethod
    def read(cls, path: str | Path, *, changes: Sequence[str] = ()) -> Recipe:
        """Return the recipe of a YAML or JSON file, or a shipped one.

        Args:
            path: the file, or the name of a recipe that comes with laconic.
            changes: assignments such as "steps.1.train.epochs=1", values in YAML.

        Raises:
            RecipeError: file, line, step and the nearest right name.

        >>> [step.name for step in Recipe.read("deep-compression").steps]
        ['prune', 'quantize', 'train']
        """
        path = find_recipe(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot be read ({error})") from None
        return cls.parse(text, where=str(path), changes=changes)

    @classmethod
    def parse(cls, text: str, *, where: str = "recipe", changes: Sequence[str] = ()) -> Recipe:
        """Return the recipe of a YAML text; see ``read``."""
        data = read_yaml(text, where)
        if not isinstance(data, Mapping):
            raise RecipeError(f"{where}: a recipe is a mapping with a 'steps:' list")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_duplicates(tree, where)
        for change in changes:
            _assign(data, change)
        try:
            made = cls(**{str(key): value for key, value in data.items()})
        except RecipeError as error:
            problems = error.problems or (FieldProblem((), str(error)),)
            lines = [
                f"{_setting(p, changes, tree) or f'{where}:{_line(tree, (*p.path, p.key))}'}: "
                f"{_place(p)}"
                for p in problems
            ]
            raise RecipeError("\n".join(lines), problems) from None
        lines = [f"{where}:{_line(tree, ('steps', index))}" for index in range(len(made.steps))]
        vars(made)["places"] = tuple(lines)  # not a field: recipes are equal wherever they stand
        return made

    def to_yaml(self) -> str:
        """Return the text that ``read`` takes."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100))

    def check(self, model: nn.Module, task: Task | None) -> None:
        """Refuse, in the first second, what could only fail in the third hour.

        Raises:
            LaconicError: a scope selects nothing, steps stand in an impossible order, ...
        """
        if task is not None:
            task.check(model)
        for index, step in enumerate(self.steps):
            earlier = self.steps[:index]
            with located(index, step, self.places):
                step.check(model, task, earlier)
                if index + 1 < len(self.steps):
                    model = step.outline(model, earlier)


@contextlib.contextmanager
def located(index: int, step: Step, places: Sequence[str] = ()) -> Iterator[None]:
    """Say in every message at which step of a recipe something was refused.

    Args:
        index: of the step, from 0.
        step: what is done there.
        places: file and line of steps, as far as they are known.

    >>> from laconic.structure import Prune
    >>> with located(1, Prune("weights", keep=0.5)):
    ...     raise LaconicError("nothing is left")
    Traceback (most recent call last):
    laconic.errors.LaconicError: steps.1 (prune): nothing is left
    """
    try:
        yield
    except LaconicError as error:
        what = str(error).removeprefix(f"{step.name}: ")
        place = f"{places[index]}: " if index < len(places) else ""
        error.args = (f"{place}steps.{index} ({step.name}): {what}",)
        raise


def _place(problem: FieldProblem) -> str:
    path = problem.path
    if len(path) >= 3 and path[0] == "steps":
        rest = ".".join(str(part) for part in path[3:])
        return f"steps.{path[1]} ({path[2]}): {rest}{': ' if rest else ''}{problem.message}"
    return str(problem)


def _setting(problem: FieldProblem, changes: Sequence[str], tree: yaml.Node | None) -> str:
    """Return the last assignment that wrote what is wrong, or nothing if the file did."""
    path = (*problem.path, problem.key) if problem.key else problem.path
    wrong = f"{'.'.join(str(part) for part in path)}."
    for change in reversed(changes):
        written = f"{change.partition('=')[0].strip()}."
        # An assignment makes the keys above it that the file has not.
        made = problem.key and written.startswith(wrong) and not _written(tree, path)
        if wrong.startswith(written) or made:
            return _option(change)
    return ""


def _written(node: yaml.Node | None, path: tuple[str | int, ...]) -> bool:
    """Return whether a file has something at a path."""
    for part in path:
        found = _child(node, part)
        if found is None:
            return False
        node = found[0]
    return True


def _option(change: str) -> str:
    """Return an assignment as it is written on the command line."""
    path, equals, text = change.partition("=")
    short = path.strip() in ("model", "task", "teacher")
    return f"--{path.strip()} {text}" if equals and short else f"--set {change}"


def _line(node: yaml.Node | None, path: tuple[str | int, ...]) -> int:
    """Return the 1-based line of a path, or of its nearest ancestor."""
    line = 1 if node is None else node.start_mark.line + 1
    for part in path:
        found = _child(node, part)
        if found is None:
            break
        node, line = found
    return line


def _child(node: yaml.Node | None, part: str | int) -> tuple[yaml.Node, int] | None:
    """Return what a key or an index leads to, and its 1-based line."""
    if isinstance(node, yaml.MappingNode):
        lines = {key.value: (value, key.start_mark.line + 1) for key, value in node.value}
        return lines.get(str(part))
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], node.value[part].start_mark.line + 1
    return None


def _refuse_duplicates(root: yaml.Node | None, where: str) -> None:
    queue, visited = [root], set()
    while queue:
        node = queue.pop()
        if id(node) in visited:  # an alias: the same node once more, or a node inside itself
            continue
        visited.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _refuse_duplicate_keys(node, where)
            queue.extend(value for _, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            queue.extend(node.value)


def _refuse_duplicate_keys(node: yaml.MappingNode, where: str) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen:
            line = key.start_mark.line + 1
            raise RecipeError(f"{where}:{line}: '{key.value}' is written twice; keep one")
        seen.add(str(key.value))


def _assign(data: Any, change: str) -> None:
    """Set one value of a recipe's data: ``steps.1.train.epochs=1``."""
    path, equals, text = change.partition("=")
    if not equals:
        raise RecipeError(f"{_option(change)}: write path=value, such as steps.1.train.epochs=1")
    try:
        value = read_yaml(text)
    except RecipeError:
        raise RecipeError(f"{_option(change)}: the value is not YAML; quote it") from None
    *parents, last = path.strip().split(".")
    here, above = data, ""
    for part in parents:
        key = _key(here, part, above, change)
        if here[key] is None:
            here[key] = {}
        elif isinstance(here[key], str):
            here[key] = {here[key]: {}}
        here, above = here[key], f"{above}.{part}" if above else part
    here[_key(here, last, above, change)] = value


def _key(here: Any, part: str, above: str, change: str) -> str | int:
    """Return a key or an index of what stands at ``above``; a field not written is made."""
    if isinstance(here, list):
        if part.isdigit() and int(part) < len(here):
            return int(part)
        raise RecipeError(
            f"{_option(change)}: {above} has items 0 to {len(here) - 1}, not '{part}'"
        )
    if not isinstance(here, dict):
        raise RecipeError(f"{_option(change)}: {above} is {here!r}, which has no '{part}'")
    # The one key of a list's item names a step: another one beside it is a slip.
    if part not in here and above.rpartition(".")[2].isdigit():
        raise RecipeError(f"{_option(change)}: '{part}' is not in {above}{nearest(part, here)}")
    here.setdefault(part)
    return part


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with laconic, by name.

    >>> shipped_recipes()["deep-compression"].name
    'deep-compression.yaml'
    """
    folder = Path(str(resources.files("laconic") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe given by path or by the name of a shipped one.

    Raises:
        RecipeError: there is neither; the nearest name is given.

    >>> find_recipe("deep-compression") == shipped_recipes()["deep-compression"]
    True
    """
    shipped = shipped_recipes()
    if Path(name).is_file():
        return Path(name)
    if str(name) in shipped:
        return shipped[str(name)]
    close = difflib.get_close_matches(str(name), shipped, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else f"; shipped ones: {', '.join(shipped)}"
    raise RecipeError(f"no recipe file '{name}'{hint}")


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, for editors.

    Families become definitions: one name, or one key with the member's fields or the first of
    them.

    >>> schema()["required"]
    ['steps']
    """
    definitions: dict[str, Any] = {}
    root = _resolved(Recipe.model_json_schema(), definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}


def _resolved(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_resolved(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "x-family" in node:
        _define(node["x-family"], definitions)
        return {"$ref": f"#/$defs/{node['x-family']}"}
    for name, inner in node.get("$defs", {}).items():
        definitions.setdefault(name, _resolved(inner, definitions))
    found = {key: _resolved(value, definitions) for key, value in node.items() if key != "$defs"}
    if isinstance(found.get("description"), str):  # and not the schema of a field of that name
        found["description"] = found["description"].partition("\n\n>>> ")[0]
    return found


def _define(family: str, definitions: dict[str, Any]) -> None:
    if family in definitions:
        return
    definitions[family] = {}
    found = next(kind for kind in families() if kind.__name__ == family)
    named: dict[str, Any] = dict(members(found, every=True))
    forms: list[Any] = [{"enum": list(named)}]
    for name, member in named.items():
        body = _resolved(member.model_json_schema(), definitions)
        first = [body["properties"][field] for field in member.positional[:1]]
        fields = {"anyOf": [body, *first]} if first else body
        forms.append(
            {"type": "object", "properties": {name: fields}, "additionalProperties": False}
        )
    definitions[family] = {"anyOf": [*forms, {"type": ["number", "array"]}]}


def families() -> list[type[Value]]:
    """Return every family of values a recipe may name: Step, Representation, ...

    >>> Step in families()
    True
    """
    members(Step, every=True)
    found, queue = [], [Value]
    while queue:
        kind = queue.pop()
        queue.extend(kind.__subclasses__())
        if ABC in kind.__bases__:
            found.append(kind)
    return found
