from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dp_flash_attention.noise import TestKey
from dp_flash_attention.training import ParameterAverage, RunDirectory
from dp_flash_attention.training.checkpoint import load_latest_checkpoint, save_checkpoint
from dp_flash_attention.training.loop import RunState


def state_of(model: nn.Module, optimizer: type[torch.optim.Optimizer], averaged: bool) -> RunState:
    average = ParameterAverage(dict(model.named_parameters()), decay=0.9) if averaged else None
    return RunState(model=model, optimizer=optimizer(model.parameters(), lr=0.1), average=average)


def one_step(state: RunState) -> None:
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    if state.average is not None:
        state.average.update()


def test_a_state_goes_through_a_checkpoint_and_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    for number, (kind, averaged) in enumerate([(torch.optim.AdamW, True), (torch.optim.SGD, False)]):
        with RunDirectory.open(tmp_path / str(number), test_key=TestKey("loop")) as run:
            state = state_of(nn.Linear(3, 2), kind, averaged)
            one_step(state)
            path = save_checkpoint(run.checkpoints, state.to_checkpoint(run, 1))
            # The estimate decides whether the disk is large enough: never below what is written.
            assert path.stat().st_size <= state.checkpoint_bytes() + 4096
            again = state_of(nn.Linear(3, 2), kind, averaged)
            found = load_latest_checkpoint(run.checkpoints, run_id=run.run_id)
            assert found is not None
            again.load(found.state)
            for taken in (state, again):
                one_step(taken)
                if taken.average is not None:
                    taken.average.copy_to_model()
            for name, value in state.model.state_dict().items():
                assert torch.equal(value, again.model.state_dict()[name])
