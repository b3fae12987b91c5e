"""Squared per-example norms and weighted gradients as Triton kernels. Needs triton; imported only where a kernel is launched.

``gram_norm.py`` and ``outer_norm.py`` are the two forms of ``clipping.norms``; their references are the functions of the
same names there. ``embedding_norm.py`` is the norm of ``EmbeddingContribution``. ``weighted_grad.py`` is the clipped sum of
``LinearContribution``.
"""

from dp_flash_attention.clipping.kernels.embedding_norm import embedding_norm
from dp_flash_attention.clipping.kernels.gram_norm import gram_norm
from dp_flash_attention.clipping.kernels.outer_norm import outer_norm
from dp_flash_attention.clipping.kernels.selfcheck import (
    require_agreement,
    require_embedding_agreement,
    require_weighted_grad_agreement,
)
from dp_flash_attention.clipping.kernels.weighted_grad import weighted_grad

__all__ = [
    "embedding_norm",
    "gram_norm",
    "outer_norm",
    "require_agreement",
    "require_embedding_agreement",
    "require_weighted_grad_agreement",
    "weighted_grad",
]
