"""The norm of a parameter that is used several times: tied weights, reused modules.

Uses of one parameter add up before the norm is taken, so their cross terms belong to it. They are exact.

Shape suffixes: B examples, T rows (tokens) an example, D inputs, P outputs, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dp_flash_attention.clipping.contributions import (
    Contribution,
    DenseContribution,
    EmbeddingContribution,
    LinearContribution,
    PairsWithOthers,
)
from dp_flash_attention.clipping.norms import (
    SCRATCH_BYTES,
    accumulation_dtype,
    cancelled_examples,
    gram_cross,
    kernel_tied_cross,
    tied_cross_path,
)


def combined_sq_norms(contributions: Sequence[Contribution]) -> Tensor:
    """Returns each example's squared norm of the *sum* of a parameter's contributions, shape [B].

    ``‖Σ_k a_k‖² = Σ_k ‖a_k‖² + 2 Σ_{k<l} ⟨a_k, a_l⟩``. Kinds that have a cheap inner product use
    it; for the others the per-example gradients are formed one example at a time, and so they are for
    examples whose uses cancel.
    """
    if len(contributions) == 1:
        return contributions[0].sq_norms()
    merged = _merge(contributions)
    total = merged[0].sq_norms()
    for k, second in enumerate(merged):
        if k > 0:
            total = total + second.sq_norms()
        for first in merged[:k]:
            total = total + 2.0 * _inner_products(first, second)
    mass_B = torch.stack([c.mass() for c in merged]).sum(0)
    for i in cancelled_examples(total, mass_B, num_rows=sum(c.num_rows for c in merged)).tolist():
        gradient = torch.stack([c.dense(i, i + 1).reshape(-1) for c in merged]).sum(0)
        total[i] = torch.dot(gradient, gradient)
    return total


def _merge(contributions: Sequence[Contribution]) -> list[Contribution]:
    """Joins contributions of the same kind that join exactly (look-ups, dense gradients)."""
    lookups = [c for c in contributions if isinstance(c, EmbeddingContribution)]
    dense = [c for c in contributions if isinstance(c, DenseContribution)]
    others = [c for c in contributions if not isinstance(c, (EmbeddingContribution, DenseContribution))]
    if lookups:
        others.append(
            EmbeddingContribution(
                ids_BT=torch.cat([c.ids_BT for c in lookups], 1),
                g_BTD=torch.cat([c.g_BTD for c in lookups], 1),
                weight_shape=lookups[0].weight_shape,
            )
        )
    if dense:
        others.append(DenseContribution(grads_B=torch.stack([c.grads_B for c in dense]).sum(0)))
    return others


def _inner_products(first: Contribution, second: Contribution) -> Tensor:
    """Returns ``⟨first_i, second_i⟩`` for each example i, shape [B]."""
    for one, other in ((first, second), (second, first)):
        if isinstance(one, PairsWithOthers):
            products_B = one.inner_products(other)
            if products_B is not None:
                return products_B
    if isinstance(first, LinearContribution):
        if isinstance(second, LinearContribution) and first.input_first == second.input_first:
            dtype = accumulation_dtype(first.x_BTD, first.g_BTP)
            return gram_cross(
                first.x_BTD.to(dtype), first.g_BTP.to(dtype), second.x_BTD.to(dtype), second.g_BTP.to(dtype)
            )
        if isinstance(second, EmbeddingContribution) and not first.input_first:
            return _linear_embedding_inner_products(first, second)
    return _dense_inner_products(first, second)


def _linear_embedding_inner_products(head: LinearContribution, table: EmbeddingContribution) -> Tensor:
    """Returns ``Σ_{t,s} g_s[id_t] ⟨e_t, h_s⟩`` for each example, the tied weight's cross term.

    ``e_t`` is the embedding's gradient at token t, ``h_s`` the head's input and ``g_s`` the logits'
    gradient at token s; columns ``id_t`` of g are gathered, so nothing of size V×D appears.
    """
    if tied_cross_path(table.g_BTD, head.x_BTD, head.g_BTP) == "triton":
        return kernel_tied_cross(table.ids_BT, table.g_BTD, head.x_BTD, head.g_BTP)
    dtype = accumulation_dtype(head.g_BTP, table.g_BTD)
    size, num_rows = table.ids_BT.shape
    parts = []
    chunk = max(1, SCRATCH_BYTES // max(1, 2 * num_rows * head.g_BTP.shape[1] * dtype.itemsize))
    for start in range(0, size, chunk):
        part = slice(start, start + chunk)
        g_BSP, ids_BT = head.g_BTP[part], table.ids_BT[part]
        columns = ids_BT[:, None, :].expand(-1, g_BSP.shape[1], -1)
        picked_BST = g_BSP.gather(2, columns).to(dtype)
        scores_BST = torch.bmm(head.x_BTD[part].to(dtype), table.g_BTD[part].to(dtype).mT)
        parts.append((picked_BST * scores_BST).sum((1, 2)))
    return torch.cat(parts)


def _dense_inner_products(first: Contribution, second: Contribution) -> Tensor:
    size = first.sq_norms().shape[0]
    return torch.stack(
        [
            torch.dot(first.dense(i, i + 1).reshape(-1), second.dense(i, i + 1).reshape(-1))
            for i in range(size)
        ]
    )
