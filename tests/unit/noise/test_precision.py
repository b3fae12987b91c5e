"""The caller's precision of products is changed inside and put back after, an error included."""

import threading

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


def test_a_thread_that_leaves_does_not_switch_the_others_back():
    inside, may_look = threading.Event(), threading.Event()
    seen = []

    def looking():
        with true_float32():
            inside.set()
            may_look.wait(10)
            seen.append(settings())

    torch.set_float32_matmul_precision("medium")
    try:
        chosen = settings()
        other = threading.Thread(target=looking)
        with true_float32():
            other.start()
            assert inside.wait(10)
        may_look.set()
        other.join()
        assert seen == [("ieee", "ieee")]
        assert settings() == chosen
    finally:
        torch.set_float32_matmul_precision("highest")
