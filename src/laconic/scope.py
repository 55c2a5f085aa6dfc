"""Scope: patterns over module names that select the modules a step changes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase

from torch import nn

from laconic.errors import ScopeError, nearest
from laconic.names import QUANTIZERS
from laconic.text_value import TextValue

__all__ = ["KINDS", "Scope", "left_out"]

KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.conv._ConvTransposeNd),
    "embedding": (nn.Embedding, nn.EmbeddingBag),
    "norm": (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
}


ALIKE = 0.6  # of two names whose difference looks like a slip
SHOWN = 8  # modules, where none is alike
ROOT = "name modules below it, such as 'kind:linear'"


def left_out(path: str) -> str:
    """Return what to do so that a scope does not select a module.

    >>> left_out("head"), left_out("")
    ("leave it out of the scope with '!head'", "name modules below it, such as 'kind:linear'")
    """
    # No pattern is for the network itself.
    return f"leave it out of the scope with '!{path}'" if path else ROOT


class Scope(TextValue):
    """Patterns that select modules by name and by kind.

    Commas unite, a space intersects, ``!`` subtracts last, with all that is inside:
    ``"encoder.* kind:linear, !*.pooler"`` is every linear of the encoder but those of the
    pooler. A pattern is a shell pattern over dotted names or ``kind:`` followed by linear,
    conv, embedding or norm.

    Raises:
        ScopeError: the text is empty or names an unknown kind.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> list(Scope("kind:linear, !2").select(model))
    ['0']
    """

    example = "encoder.* kind:linear, !*.pooler"
    described = "patterns over module names; ! subtracts"

    def __init__(self, text: str = "*") -> None:
        super().__init__(", ".join(part.strip() for part in text.split(",")))
        terms = [part.split() for part in self.text.split(",")]
        if not all(terms):
            raise ScopeError(f"scope {text!r} has an empty part; write '*' for every module")
        self._plus = [term for term in terms if not term[0].startswith("!")]
        self._minus = [[term[0][1:], *term[1:]] for term in terms if term[0].startswith("!")]
        for term in self._plus + self._minus:
            for pattern in term:
                self._check(pattern)

    def _check(self, pattern: str) -> None:
        kind = pattern.removeprefix("kind:")
        if kind != pattern and kind not in KINDS:
            raise ScopeError(f"scope {self.text!r}: no kind '{kind}'{nearest(kind, KINDS)}")
        if not pattern or pattern.startswith("!"):
            raise ScopeError(f"scope {self.text!r}: '!' goes before a pattern, once, at its start")

    def select(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the selected modules by dotted name, in the model's order.

        What stands in the place of a module that surgery replaced, and all below it, answers
        to that one's name too; what rounds the input of a module, to the module's name and kind.

        Raises:
            ScopeError: a term selects nothing; the nearest names are given.
        """
        modules = dict(model.named_modules())
        names = _names(model, modules)
        wanted: set[str] = set()
        for term in self._plus or [["*"]]:
            wanted |= self._matching(term, modules, names)
        for term in self._minus:
            without = self._matching(term, modules, names)
            wanted = {name for name in wanted if without.isdisjoint(_around(name))}
        return {name: module for name, module in modules.items() if name in wanted}

    def _matching(
        self, term: list[str], modules: dict[str, nn.Module], names: dict[str, list[str]]
    ) -> set[str]:
        tests = [_predicate(pattern) for pattern in term]
        found = {
            name for name in modules if all(t(names[name], modules[_host(name)]) for t in tests)
        }
        if not found:
            raise ScopeError(f"'{' '.join(term)}' selects no module; {_hint(term, modules, names)}")
        return found


def _around(name: str) -> Iterator[str]:
    """Yield the name and those of the modules that it is inside of, but for the network's."""
    yield name
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _names(model: nn.Module, modules: Iterable[str]) -> dict[str, list[str]]:
    """Return the names that each module answers to."""
    note = getattr(model, "laconic", {})
    replaced = note.get("edits", {}).get("modules", {})
    return {
        name: [name, _host(name), *(path for path in replaced if name.startswith(f"{path}."))]
        for name in modules
    }


def _host(name: str) -> str:
    """Return the module whose numbers a module rounds; of any other, itself."""
    return name.partition(f".{QUANTIZERS}.")[0]


def _predicate(pattern: str) -> Callable[[list[str], nn.Module], bool]:
    if pattern.startswith("kind:"):
        kinds = KINDS[pattern.removeprefix("kind:")]
        return lambda names, module: isinstance(module, kinds)
    return lambda names, module: any(fnmatchcase(name, pattern) for name in names)


def _hint(term: list[str], modules: dict[str, nn.Module], names: dict[str, list[str]]) -> str:
    """Return what to write in the place of a term that selects nothing."""
    for pattern in term:
        test = _predicate(pattern)
        if any(test(names[name], module) for name, module in modules.items()):
            continue
        if pattern.startswith("kind:"):
            return f"the network has no {pattern.removeprefix('kind:')}"
        named = [name for name in modules if name]
        if near := _similar(pattern, named):
            return f"nearest: {', '.join(near)}"
        top = [name for name in named if "." not in name]
        return f"its modules: {', '.join(top[:SHOWN]) or 'none has a name'}"
    return f"{' and '.join(term)} have none in common"


def _similar(pattern: str, names: list[str]) -> list[str]:
    """Return up to three patterns of the same form that select something, the nearest first."""
    forms, inner = names, [name.rpartition(".") for name in names if "." in name]
    if pattern.startswith("*."):
        forms = list(dict.fromkeys(f"*.{last}" for _, _, last in inner)) or names
    elif pattern.endswith(".*"):
        forms = list(dict.fromkeys(f"{parent}.*" for parent, _, _ in inner))

    def likeness(form: str) -> float:
        asked, there = pattern.replace("*", ""), form.replace("*", "")
        return difflib.SequenceMatcher(None, asked, there).ratio()

    # Of equal ones, the first of the network.
    near = sorted(forms, key=likeness, reverse=True)[:3]
    return [form for form in near if likeness(form) > ALIKE]
