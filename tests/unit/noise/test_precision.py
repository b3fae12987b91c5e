"""The caller's precision of products is changed inside and put back after, an error included."""

import pytest
import torch

from dp_flash_attention.noise.precision import true_float32


def settings():
    return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_products_are_in_full_precision_inside_and_as_before_after(setting):
    torch.set_float32_matmul_precision(setting)
    before = settings()
    try:
        with true_float32():
            assert settings() == ("ieee", "ieee")
        assert settings() == before
        with pytest.raises(KeyError), true_float32():
            raise KeyError
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")
