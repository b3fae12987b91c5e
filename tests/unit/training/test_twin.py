from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dp_flash_attention.training.twin import train_without_privacy

DATA = torch.randn(30, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x)[:, 0] - x[:, 0]) ** 2


def trained(**changes: Any) -> tuple[nn.Module, list[tuple[int, int]]]:
    torch.manual_seed(0)
    model, seen = nn.Linear(3, 1).double(), []
    options: dict[str, Any] = {
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": loss_fn,
        "sampling_prob": 0.5,
        "num_steps": 3,
        "microbatch_size": 4,
        "lr_schedule": lambda step: 1.0 / (1 + step),
        "ema_decay": 1e-12,  # after each step the average is the step
        "on_step": lambda step, total: seen.append((step, total)),
    }
    train_without_privacy(model, DATA, **(options | changes))
    return model, seen


def test_it_takes_ordinary_steps_on_the_mean_of_each_sample() -> None:
    model, seen = trained()
    assert seen == [(1, 3), (2, 3), (3, 3)]
    torch.manual_seed(0)
    expected, generator = nn.Linear(3, 1).double(), torch.Generator().manual_seed(0)
    for step in range(3):
        sample = DATA[torch.rand(30, generator=generator) < 0.5]
        gradients = torch.autograd.grad(loss_fn(expected, sample).mean(), list(expected.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                parameter -= 0.1 / (1 + step) * gradient
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=1e-9, atol=1e-9)


def test_the_size_of_a_microbatch_does_not_matter() -> None:
    one, whole = trained(microbatch_size=1)[0], trained(microbatch_size=100)[0]
    torch.testing.assert_close(dict(one.state_dict()), dict(whole.state_dict()))


def test_an_empty_sample_moves_nothing() -> None:
    torch.manual_seed(0)
    before = nn.Linear(3, 1).double().state_dict()
    model, seen = trained(sampling_prob=1e-9)
    assert len(seen) == 3
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
