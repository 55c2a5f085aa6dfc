"""Atoms: the factors of dimensions, made one where an operation couples them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["Atom", "Dim", "cut", "fixed", "freeze", "mark", "merge", "reshape", "root", "unify"]


class Atom:
    """A factor of dimensions; a node of a union-find forest.

    A view may show that it is a product of smaller atoms (768 = 12 heads of 64), a
    concatenation that it is a sum of them (48 channels = 16 and 32 that were joined).
    """

    __slots__ = ("frozen", "kids", "parent", "roles", "size", "summed")

    def __init__(self, size: int, frozen: str | None = None, roles: Iterable[str] = ()) -> None:
        self.size = size
        self.frozen = frozen
        self.roles = set(roles)
        self.parent: Atom | None = None
        self.kids: tuple[Atom, ...] = ()
        self.summed = False


Term = list[Atom]


class Dim:
    """A dimension of a tensor: a sum of products of atoms, the outermost factor first.

    Two tensors share a ``Dim`` only where one is the other one permuted.

    Attributes:
        read: a product with activations sums over this dimension of a parameter.
        made: it is the features that an operation with this parameter computes.
    """

    __slots__ = ("made", "read", "terms")

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = [list(term) for term in terms]
        self.read = False
        self.made = False

    @property
    def size(self) -> int:
        """Return how long the dimension is."""
        return sum(_size(term) for term in self.terms)

    def parts(self) -> list[Term]:
        """Return the terms in today's smallest atoms; those of size 1 are left out."""
        self.terms = [part for term in self.terms for part in _expand(term)]
        return self.terms

    def copy(self) -> Dim:
        """Return the same dimension of another tensor."""
        return Dim(self.terms)

    def leaves(self) -> list[Atom]:
        """Return the atoms of all terms."""
        return [atom for term in self.parts() for atom in term]

    def roots(self) -> list[tuple[int, ...]]:
        """Return what identifies the atoms of each term."""
        return [tuple(id(root(atom)) for atom in term) for term in self.parts()]

    def frozen(self) -> str | None:
        """Return why no part of it may change, or None: some part may."""
        reasons = [atom.frozen for atom in self.leaves()]
        return reasons[0] if None not in reasons and reasons else None


def fixed(size: int, why: str) -> Dim:
    """Return a new dimension that may not change."""
    return Dim([[Atom(size, why)]])


def root(atom: Atom) -> Atom:
    """Return the atom that stands for all those made one with it."""
    while atom.parent is not None:
        atom = atom.parent
    return atom


def freeze(dim: Dim, why: str) -> None:
    """Forbid that a dimension changes; the first reason stays."""
    for atom in dim.leaves():
        _freeze(atom, why)


def mark(dim: Dim, role: str) -> None:
    """Note what an operation does with a dimension."""
    for atom in dim.leaves():
        atom.roles.add(role)


def merge(one: Atom, other: Atom) -> None:
    """Make two atoms of one size the same."""
    one, other = root(one), root(other)
    if one is other:
        return
    if one.kids and other.kids:  # both are in the middle of a product, so frozen by now
        _freeze(one, _WOVEN)
        _freeze(other, _WOVEN)
        return
    if other.kids:
        one, other = other, one
    other.parent = one
    one.roles |= other.roles
    if other.frozen is not None:
        _freeze(one, other.frozen)


def unify(one: Dim, other: Dim) -> None:
    """Make two dimensions of one size the same; atoms are split until they agree."""
    while True:
        ours, theirs = one.parts(), other.parts()
        agreed = _agree(ours, theirs)
        if agreed is None:
            break
        if not agreed:
            why = f"its factors {_sizes(ours)} do not fit {_sizes(theirs)}"
            freeze(one, why)
            freeze(other, why)
            return
    for term, match in zip(ours, theirs, strict=True):
        for atom, twin in zip(term, match, strict=True):
            merge(atom, twin)


def reshape(dims: Sequence[Dim], shape: Sequence[int]) -> list[Dim]:
    """Return the dimensions of a view; what atoms do not fit is frozen.

    Dimensions that together are as long as some of the view are looked at by themselves.
    """
    made: list[Dim] = []
    for old, sizes in _groups(dims, shape):
        found = _regroup(old, sizes)
        if found is None:
            for dim in old:
                freeze(dim, UNFACTORED)
            found = [fixed(size, UNFACTORED) for size in sizes]
        made += found
    return made


def cut(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    """Return consecutive pieces of a dimension, or None where atoms cannot be cut there."""
    pieces, start = [], 0
    for size in sizes:
        if not (_cut_at(dim, start) and _cut_at(dim, start + size)):
            return None
        pieces.append((start, start + size))
        start += size
    return [Dim(_between(dim.parts(), *piece)) for piece in pieces]


UNFACTORED = "a view that its factors do not fit"
_WOVEN = "joined parts are woven into another dimension"


def _size(term: Term) -> int:
    return math.prod(atom.size for atom in term)


def _sizes(terms: Sequence[Term]) -> str:
    return " + ".join(" x ".join(str(atom.size) for atom in term) or "1" for term in terms)


def _freeze(atom: Atom, why: str) -> None:
    atom = root(atom)
    atom.frozen = atom.frozen or why
    for kid in atom.kids:
        _freeze(kid, why)


def _split(atom: Atom, sizes: Sequence[int], *, summed: bool) -> bool:
    """Split an atom; False where it was split otherwise before."""
    if atom.kids:
        return False
    atom.kids = tuple(Atom(size, atom.frozen, atom.roles) for size in sizes)
    atom.summed = summed
    return True


def _factors(term: Term) -> list[Atom]:
    """Return the factors of a product, products among them taken apart."""
    found = []
    for atom in map(root, term):
        if atom.kids and not atom.summed:
            found += _factors(list(atom.kids))
        elif atom.size != 1:
            found.append(atom)
    return found


def _expand(term: Term) -> list[Term]:
    """Return a product as a sum of products; only its outermost factor may be a sum."""
    made: list[Term] = [[]]
    for atom in _factors(term):
        if atom.kids and made == [[]]:
            made = [part for kid in atom.kids for part in _expand([kid])]
            continue
        if atom.kids:
            _freeze(atom, _WOVEN)
        made = [[*outer, atom] for outer in made]
    return made


def _agree(ours: Sequence[Term], theirs: Sequence[Term]) -> bool | None:
    """Split the first atoms that differ: None: none does; False: they cannot be split."""
    for one, other in zip(ours, theirs, strict=False):
        if _size(one) != _size(other):
            big, small = (one, other) if _size(one) > _size(other) else (other, one)
            return _cut_term(big, _size(small))
        for atom, twin in zip(one, other, strict=False):
            if atom.size != twin.size:
                big_atom, least = (atom, twin) if atom.size > twin.size else (twin, atom)
                return _divide(big_atom, least.size)
    return None if len(ours) == len(theirs) else False


def _divide(atom: Atom, size: int) -> bool:
    if atom.size % size:
        return False
    return _split(atom, [size, atom.size // size], summed=False)


def _cut_term(term: Term, at: int) -> bool:
    """Cut the outermost factor of a product, so that its first part has this size."""
    inner = _size(term[1:])
    if at % inner:
        return False
    first = at // inner
    return _split(term[0], [first, term[0].size - first], summed=True)


def _cut_at(dim: Dim, place: int) -> bool:
    start = 0
    for term in dim.parts():
        end = start + _size(term)
        if start < place < end:
            return _cut_term(term, place - start)
        start = end
    return True


def _between(terms: Sequence[Term], first: int, last: int) -> list[Term]:
    found, start = [], 0
    for term in terms:
        if first <= start < last:
            found.append(term)
        start += _size(term)
    return found


def _groups(dims: Sequence[Dim], shape: Sequence[int]) -> Iterator[tuple[list[Dim], list[int]]]:
    """Yield the least runs of dimensions and of sizes whose products are the same."""
    if 0 in shape:
        yield list(dims), list(shape)
        return
    left, right = list(dims), list(shape)
    while left or right:
        old: list[Dim] = []
        new: list[int] = []
        before = after = 1
        while not (old or new) or before != after:
            if before <= after and left:
                old.append(left.pop(0))
                before *= old[-1].size
            else:
                new.append(right.pop(0))
                after *= new[-1]
        yield old, new


def _regroup(dims: Sequence[Dim], shape: Sequence[int]) -> list[Dim] | None:
    wide = [dim for dim in dims if dim.size != 1]
    if [dim.size for dim in wide] == [size for size in shape if size != 1]:
        return [wide.pop(0) if size != 1 else Dim([[]]) for size in shape]
    if 0 in shape:
        return None
    tokens = [token for dim in dims for token in _tokens(dim)]
    made = [_take(tokens, size) for size in shape]
    found = [dim for dim in made if dim is not None]
    return found if len(found) == len(made) and not tokens else None


def _tokens(dim: Dim) -> list[Dim]:
    """Return the atoms of a product one by one; a sum stays whole, unless it is frozen."""
    parts, why = dim.parts(), dim.frozen()
    if len(parts) == 1:
        return [Dim([[atom]]) for atom in parts[0]]
    return [dim if why is None else fixed(dim.size, why)]


def _take(tokens: list[Dim], size: int) -> Dim | None:
    """Take the outermost tokens that make up a size."""
    made = Dim([[]])
    while size > 1:
        if not tokens:
            return None
        token = tokens.pop(0)
        terms = token.parts()
        if token.size > size:
            if len(terms) != 1 or not _divide(terms[0][0], size):
                return None
            inner = _tokens(token)
            tokens[:0] = inner[1:]
            token = inner[0]
            terms = token.parts()
        if size % token.size or (len(terms) > 1 and made.terms != [[]]):
            return None
        size //= token.size
        made = Dim([[*outer, *term] for outer in made.terms for term in terms])
    return made
