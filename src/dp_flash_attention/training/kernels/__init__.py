"""The training room's kernels. Needs triton; imported only where one is launched.

``noisy_adamw.py`` makes a step's noise and takes AdamW's step with it in one pass; its reference is the noise of
``noise.writer`` and ``torch.optim.AdamW``.
"""

from dp_flash_attention.training.kernels.noisy_adamw import Moments, noisy_adamw_
from dp_flash_attention.training.kernels.selfcheck import require_agreement

__all__ = ["Moments", "noisy_adamw_", "require_agreement"]
