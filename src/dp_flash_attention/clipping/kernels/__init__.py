"""Squared per-example norms and weighted gradients as Triton kernels. Needs triton; imported only where a kernel is launched.

``gram_norm.py`` and ``outer_norm.py`` are the two forms of ``clipping.norms``; their references are the functions of the
same names there. ``weighted_grad.py`` is the clipped sum of ``LinearContribution``, ``embedding_norm.py`` the norm of
``EmbeddingContribution``, ``tied_cross.py`` the cross term of a table that is also a head's weight,
``norm_backward.py`` the backward pass of norm layers.
"""

from dp_flash_attention.clipping.kernels.embedding_norm import embedding_norm
from dp_flash_attention.clipping.kernels.gram_norm import gram_norm
from dp_flash_attention.clipping.kernels.norm_backward import norm_backward
from dp_flash_attention.clipping.kernels.outer_norm import outer_norm
from dp_flash_attention.clipping.kernels.selfcheck import (
    require_agreement,
    require_embedding_agreement,
    require_norm_layer_agreement,
    require_tied_agreement,
    require_weighted_grad_agreement,
)
from dp_flash_attention.clipping.kernels.tied_cross import tied_cross
from dp_flash_attention.clipping.kernels.weighted_grad import weighted_grad

__all__ = [
    "embedding_norm",
    "gram_norm",
    "norm_backward",
    "outer_norm",
    "require_agreement",
    "require_embedding_agreement",
    "require_norm_layer_agreement",
    "require_tied_agreement",
    "require_weighted_grad_agreement",
    "tied_cross",
    "weighted_grad",
]
