"""Look-up: in training, laid embeddings decode only the rows that a batch asks for."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.weights.laid import Laid, latent_of
from laconic.weights.representation import SPREAD, ste

__all__ = ["looked_up"]


@contextmanager
def looked_up(model: nn.Module) -> Iterator[None]:
    """Have laid embeddings decode only what is looked up, inside a with block.

    A vocabulary has tens of thousands of rows and a batch of texts some hundreds. Outputs and
    gradients are the same, bit for bit. It applies where a row is decoded from itself and its own
    table alone: ``granularity="row"``, no mask.

    Args:
        model: the network; its embeddings get their own forward back at the end.

    >>> from laconic.weights import Ternary, lay
    >>> table = nn.Embedding(1000, 8)
    >>> lay(table, "weight", Ternary("row"))
    >>> ids = torch.tensor([[3, 5, 3]])
    >>> with looked_up(table):
    ...     some = table(ids)
    >>> torch.equal(some, table(ids))
    True
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding) and (laid := _row_by_row(module)) is not None:
                module.forward = functools.partial(_look_up, module, laid)  # type: ignore[method-assign]
                stack.callback(delattr, module, "forward")
        yield


def _row_by_row(table: nn.Embedding) -> Laid | None:
    """Return what is laid on a table, where each of its rows is decoded by itself."""
    plain: Any = parametrize.type_before_parametrizations(table)
    own = "forward" in vars(table) or plain.forward is not nn.Embedding.forward
    if own or not parametrize.is_parametrized(table, "weight"):
        return None
    laid, latent = latent_of(table, "weight")
    if laid is None or laid.mask is not None or laid.quant_noise is not None:
        return None
    # Longer rows torch may add up in another order where they are few.
    alike = latent.is_contiguous() and latent.shape[1] < SPREAD
    tables = all(each.shape[:1] == latent.shape[:1] for each in laid.state.values())
    return laid if alike and tables and laid.representation.row_by_row else None


def _look_up(table: nn.Embedding, laid: Laid, input: Tensor) -> Tensor:  # noqa: A002 (its name)
    """Return what the table's own forward does."""
    _, latent = latent_of(table, "weight")
    rows, places = input.unique(return_inverse=True)
    some = F.embedding(rows, latent)
    state = {name: tensor[rows] for name, tensor in laid.state.items()}
    with torch.no_grad():
        decoded = laid.representation.quantized(some.detach(), None, state)
    weight = ste(decoded, laid.representation.surrogate(some, state))
    # Its gradient is not wanted.
    padding = [] if table.padding_idx is None else (rows == table.padding_idx).nonzero().flatten()
    return F.embedding(
        places,
        weight,
        int(padding[0]) if len(padding) else None,
        scale_grad_by_freq=table.scale_grad_by_freq,
    )
