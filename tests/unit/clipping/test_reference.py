"""The reference against numbers worked out by hand: everything else is compared with it."""

from __future__ import annotations

import torch
from torch import nn

from dp_flash_attention.clipping.reference import clipped_sum, per_example_gradients


def test_a_linear_map_by_hand() -> None:
    model = nn.Linear(2, 1).double()
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64)
    gradients = per_example_gradients(model, lambda rows: model(rows)[:, 0], x, batch_size=2)
    assert gradients["weight"].tolist() == x[:, None].tolist()
    assert gradients["bias"].tolist() == [[1.0], [1.0]]
    sums, norms = clipped_sum(gradients, l2_clip_norm=2.0)
    assert torch.allclose(norms, torch.tensor([26.0, 1.25], dtype=torch.float64).sqrt())
    scale = 2.0 / 26.0**0.5
    assert torch.allclose(sums["weight"], torch.tensor([[3 * scale + 0.3, 4 * scale + 0.4]]).double())
    assert torch.allclose(sums["bias"], torch.tensor([scale + 1.0]).double())
    alone, _ = clipped_sum(gradients, l2_clip_norm=2.0, weights=torch.tensor([0.0, 1.0]))
    assert torch.allclose(alone["bias"], torch.tensor([1.0]).double())


def test_frozen_parameters_and_other_leaves_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    inputs = {"x": torch.randn(3, 2), "name": "kept"}
    gradients = per_example_gradients(model, lambda rows: model(rows["x"])[:, 0], inputs, batch_size=3)
    assert {name: tuple(g.shape) for name, g in gradients.items()} == {
        "1.weight": (3, 1, 2),
        "1.bias": (3, 1),
    }
