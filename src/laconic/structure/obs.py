"""Optimal Brain Surgeon, layer by layer: scores, and survivors that make up for the pruned."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from laconic.errors import ChainError, ModelError, ScopeError
from laconic.models.attention import handing_on_padded
from laconic.models.capture import padding_mask
from laconic.scope import Scope
from laconic.step import Count, State, Step
from laconic.structure.columns import columns
from laconic.structure.criteria import Criterion, second_order
from laconic.tasks.split import tensors_in
from laconic.tasks.task import evaluation, needed
from laconic.weights.laid import (
    laid_tensors,
    latent_of,
    mask_of,
    owner,
    owners_of,
)
from laconic.weights.quantize import coded
from laconic.weights.representation import full_mask
from laconic.weights.slopes import drawn, probe

__all__ = [
    "OBS",
    "compensated",
    "damped",
    "inverse_diagonal",
]

# Layers whose output is a product of each row of the weight with inputs seen by all rows.
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
# Numbers of the rows' matrices that are factorised at once: 128 MiB in float64.
_AT_ONCE = 2**24
_SINGULAR = (
    "the second moment of a layer's inputs cannot be inverted; raise damping, or give more batches"
)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Return H + damping * mean diagonal * I."""
    size = damping * hessian.diagonal().mean()
    return hessian + size * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)


def inverse_diagonal(hessian: Tensor, mask: Tensor) -> Tensor:
    """Return [H_SS^-1]_ii for the survivors S of every row, ones elsewhere [rows, width].

    Where all survive, one inverse serves all rows; else it takes about survivors^3
    multiplications a row, in batches of rows.

    Args:
        hessian: H, symmetric and positive definite [width, width].
        mask: bool [rows, width]; True survives.

    Raises:
        ModelError: H is not positive definite.

    >>> inverse_diagonal(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([[True, True]]))
    tensor([[0.5000, 0.2500]])
    """
    if bool(mask.all()):
        return _inverse(hessian).diagonal().expand(mask.shape)
    result = torch.ones_like(mask, dtype=hessian.dtype)
    counts = mask.sum(dim=1)
    for chosen in _chunks(torch.argsort(counts, stable=True), counts):
        most = int(counts[chosen].max())
        # The survivors of a row come first, in order; rows with fewer are padded by an identity.
        places = torch.argsort(mask[chosen].int(), dim=1, descending=True, stable=True)[:, :most]
        real = torch.arange(most, device=mask.device) < counts[chosen][:, None]
        part = hessian[places[:, :, None], places[:, None, :]]
        part = torch.where(real[:, :, None] & real[:, None, :], part, 0.0)
        part.diagonal(dim1=1, dim2=2).masked_fill_(~real, 1.0)
        result[chosen[:, None], places] = _inverse(part).diagonal(dim1=1, dim2=2)
    return result


def _inverse(hessian: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if bool(failed.any()):
        raise ModelError(_SINGULAR)
    return torch.cholesky_inverse(factor)


def compensated(
    weight: Tensor, hessian: Tensor, mask: Tensor, *, tolerance: float = 1e-6
) -> Tensor:
    """Return the rows that minimise ``(v - w)^T H (v - w)`` with zeros where the mask is False.

    ``v_S = w_S + H_SS^-1 H_SP w_P`` for the survivors S and the pruned P of each row: what
    Optimal Brain Surgeon arrives at, in one solution instead of one update per pruned weight.
    Found by conjugate gradients for all rows at once, so a step is one product of matrices; they
    lower exactly this error, and some tens of steps do.

    Args:
        weight: w [rows, width].
        hessian: H, symmetric and positive definite [width, width].
        mask: bool [rows, width]; True survives.
        tolerance: of the error's distance to its least, relative to where it begins.

    Raises:
        ModelError: H is not positive definite.

    >>> mask = torch.tensor([[False, True]])
    >>> compensated(torch.tensor([[2.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]]), mask)
    tensor([[0., 2.]])
    """
    scale = hessian.diagonal()
    if not bool((scale > 0).all()):
        raise ModelError(_SINGULAR)
    change = torch.zeros_like(weight)
    rest = torch.where(mask, torch.where(mask, 0.0, weight) @ hessian, 0.0)
    direction = rest / scale
    size = (rest * direction).sum(dim=1, keepdim=True)
    enough = tolerance**2 * size
    # In exact arithmetic as many steps as a row is wide would do.
    for _ in range(2 * weight.shape[1]):
        if bool((size <= enough).all()):
            break
        product = torch.where(mask, direction @ hessian, 0.0)
        curvature = (direction * product).sum(dim=1, keepdim=True)
        # Rows that are done have no direction any more.
        step = torch.where(size > enough, size / curvature, 0.0)
        change += step * direction
        rest -= step * product
        last, size = size, (rest * rest / scale).sum(dim=1, keepdim=True)
        direction = rest / scale + torch.where(last > 0, size / last, 0.0) * direction
    return torch.where(mask, weight + change, 0.0)


def _chunks(order: Tensor, counts: Tensor) -> Iterator[Tensor]:
    """Yield the rows in parts, so that each part's matrices fit the memory set aside."""
    begin, sizes = 0, counts[order].tolist()
    while begin < len(order):
        end = begin + 1
        while end < len(order) and (end + 1 - begin) * sizes[end] ** 2 <= _AT_ONCE:
            end += 1
        yield order[begin:end]
        begin = end


class OBS(Criterion):
    """Score by Optimal Brain Surgeon; survivors make up for what is pruned.

    The score is ``w^2 / (2 [H^-1]_ii)``. H is that of each layer's own least-squares error,
    ``E ||W x - W_0 x||^2`` over training examples drawn by the step's seed and not augmented;
    each row of a weight has the same, less what is pruned of it already. After pruning, every
    row's survivors are set to their optimum for that error (Hassibi and Stork 1993; layer-wise
    as Dong et al. 2017). For linear layers and convolutions of one and two dimensions. Pruning
    what was pruned before (in rounds, while training) inverts one matrix per row, and is slow.

    Attributes:
        batches: at most so many; one epoch if the split has fewer.
        batch: examples per batch.
        damping: added to H's diagonal, relative to its mean.

    >>> OBS(batches=4)
    OBS(batches=4)
    """

    ranks: ClassVar[tuple[str, ...]] = ("weights",)
    needs_data: ClassVar[bool] = True

    batches: Count = 8
    batch: Count = 64
    damping: Annotated[float, Field(gt=0)] = 1e-2

    def check_weights(
        self, model: nn.Module, names: Iterable[str], earlier: Sequence[Step] = ()
    ) -> None:
        """Refuse weights of other layers, and those that will have been quantised."""
        codes = coded(model, Scope("*"), earlier)
        for name in names:
            module, _ = owner(model, name)
            if not isinstance(module, LAYERS):
                raise ScopeError(
                    f"obs scores linear layers and convolutions, and '{name}' is of a "
                    f"{type(module).__name__}; narrow the scope, such as 'kind:linear'"
                )
            representation = codes.get(name)
            if representation is not None:
                raise ChainError(
                    f"obs after quantize ({representation.name}) at '{name}': codes cannot make up "
                    "for pruned weights; put this prune first"
                )

    def scores(self, state: State, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return w^2 / (2 [H^-1]_ii), H over the survivors of each row."""
        self.check_weights(state.model, weights)
        found = {}
        for name, hessians in self._hessians(state, weights).items():
            weight = weights[name].detach()
            survives = full_mask(mask_of(state.model, name), weight)
            inverses = [
                inverse_diagonal(hessian, rows)
                for hessian, rows in zip(hessians, _rows(survives, hessians), strict=True)
            ]
            # OBD's formula, 1 / [H^-1]_ii in the place of H_ii: equal where H is diagonal.
            scores = second_order(1 / torch.stack(inverses), _rows(weight, hessians))
            found[name] = scores.reshape(weight.shape).float()
        return found

    def compensate_(
        self, state: State, before: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> None:
        """Set the survivors of every row to their optimum without what was pruned."""
        laid = laid_tensors(state.model)
        for name, hessians in self._hessians(state, before).items():
            pieces = zip(
                _rows(before[name].detach(), hessians),
                hessians,
                _rows(masks[name], hessians),
                strict=True,
            )
            # Float32 is fine enough here: the error is lowered, not inverted.
            fitted = torch.stack([compensated(w.float(), h.float(), m) for w, h, m in pieces])
            with torch.no_grad():
                laid[name][1].copy_(fitted.reshape(before[name].shape))

    def _hessians(self, state: State, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the damped H of each weight's layer, [groups, width, width] in float64.

        Inputs are those of the network with these weights, whatever is pruned by now.
        """
        task = needed(state.task, f"{self.name} needs batches")
        network, tensors = probe(state.model, weights)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(weights[name])
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        mask: Tensor | None = None

        def note(name: str, module: nn.Module, inputs: Any, named: Any) -> None:
            found = columns(module, next(tensors_in((inputs, named))), mask)
            moment = found.transpose(1, 2) @ found
            sums[name] = sums[name] + moment if name in sums else moment.double()
            counts[name] = counts.get(name, 0) + found.shape[1]

        with ExitStack() as hooks, handing_on_padded(network), evaluation(network):
            for name in weights:
                for each in owners_of(network, latent_of(network, name)[1]):
                    noting = functools.partial(note, name)
                    layer = owner(network, each)[0]
                    hooks.enter_context(layer.register_forward_pre_hook(noting, with_kwargs=True))
            for batch in drawn(state, task, self.batches, self.batch, self.name):
                mask = padding_mask(batch)
                task.call(network, batch)
        for name in weights:
            if name not in sums:
                raise ModelError(f"'{name}' is of a layer that is never called; leave it out")
        return {
            name: torch.stack([damped(2 * part / counts[name], self.damping) for part in sum_])
            for name, sum_ in sums.items()
        }


def _rows(tensor: Tensor, hessians: Tensor) -> Tensor:
    """Return a weight or its mask as [groups, rows, width], numbers in float64."""
    shaped = tensor.reshape(len(hessians), -1, hessians.shape[-1])
    return shaped if tensor.dtype == torch.bool else shaped.to(hessians.dtype)
