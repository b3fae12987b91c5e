"""AdamW with the noise in its update: the same release as the plain path, under Triton's interpreter."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_attention.core.errors import (
    InvalidInputError,
    NoiseReuseError,
    NoiseUnavailableError,
    RunStateError,
)
from dp_flash_attention.noise import TestKey, make_generator
from dp_flash_attention.training import PrivacyPlan, RunKeys, make_private, noisy_adamw, step_noise
from dp_flash_attention.training.kernels import selfcheck
from dp_flash_attention.training.noisy_adamw import NoisyAdamW
from dp_flash_attention.training.session import PrivateSession

pytest.importorskip("triton")
kernel_module = importlib.import_module("dp_flash_attention.training.kernels.noisy_adamw")
NUM_STEPS = 2
SETTINGS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes CPU tensors for CUDA tensors: the kernel's own text runs on them."""
    monkeypatch.setattr(noisy_adamw, "_is_on_gpu", lambda tensor: True)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Makes the check before the first use run again."""
    selfcheck.disagreement.cache_clear()
    yield
    selfcheck.disagreement.cache_clear()


def plan(noise: str = "secure") -> PrivacyPlan:
    more = {"num_parameters": 5} if noise == "exact" else {}
    return PrivacyPlan.for_budget(
        epsilon=4.0, delta=1e-4, num_steps=NUM_STEPS, sampling_prob=0.2, l2_clip_norm=0.7, expected_batch_size=8,
        noise=noise, **more,
    )  # fmt: skip


def small_model() -> nn.Module:
    torch.manual_seed(4)
    return nn.Linear(4, 1)


RECORDS = torch.randn(40, 4, generator=torch.Generator().manual_seed(3))


def loss_fn(model: nn.Module, rows: Tensor) -> Tensor:
    return (model(rows)[:, 0] - rows[:, 0]) ** 2


def steps_of(session: PrivateSession) -> Iterator[Any]:
    for step in session.steps(RECORDS, microbatch_size=8):
        for microbatch in step:
            session.accumulate(microbatch, loss_fn)
        yield step


def trained(
    optimizer_class: Any, noise: str = "secure", num_steps: int = NUM_STEPS, **settings: Any
) -> PrivateSession:
    model = small_model()
    optimizer = optimizer_class(model.parameters(), **(SETTINGS | settings))
    session = make_private(model, optimizer, plan(noise), keys=RunKeys(TestKey("in the update")))
    for step in steps_of(session):
        session.apply(step)
        if session.step_index == num_steps:
            break
    return session


@pytest.fixture
def chacha20(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain path on the cipher that has a kernel."""
    right = step_noise.make_generator
    monkeypatch.setattr(
        step_noise,
        "make_generator",
        lambda name, key, cipher=None: right(name, key, cipher="chacha20" if name == "secure" else None),
    )


def assert_same(first: Tensor, second: Tensor) -> None:
    """Noise agrees to 16 units of 2^-24; a few roundings of an update follow."""
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise", ["secure", "fast"])
def test_a_run_is_that_of_adamw_on_noisy_gradients(noise: str, chacha20: None) -> None:
    plain, fused = trained(torch.optim.AdamW, noise), trained(NoisyAdamW, noise)
    assert fused.step_index == NUM_STEPS
    for one, other in zip(plain.model.parameters(), fused.model.parameters(), strict=True):
        assert other.grad is None
        assert_same(other.detach(), one.detach())
        for name, value in plain.optimizer.state[one].items():
            assert_same(fused.optimizer.state[other][name], value)
        assert set(fused.optimizer.state[other]) == {"step", "exp_avg", "exp_avg_sq"}


def test_checkpoints_of_the_two_load_into_each_other(chacha20: None) -> None:
    done = trained(NoisyAdamW, num_steps=1)
    whole = trained(NoisyAdamW)
    for optimizer_class in (torch.optim.AdamW, NoisyAdamW):
        model = small_model()
        model.load_state_dict(done.model.state_dict())
        optimizer = optimizer_class(model.parameters(), **SETTINGS)
        optimizer.load_state_dict(copy.deepcopy(done.optimizer.state_dict()))
        session = make_private(model, optimizer, plan(), keys=RunKeys(TestKey("in the update")), step_index=1)
        for step in steps_of(session):
            session.apply(step)
        for one, other in zip(whole.model.parameters(), model.parameters(), strict=True):
            assert_same(other.detach(), one.detach())


def parts(count: int = 4101) -> tuple[nn.Parameter, Tensor]:
    return nn.Parameter(torch.randn(count)), torch.randn(count)


def staged(
    optimizer: NoisyAdamW, sums: dict[Any, Tensor], *, stddev: float = 0.5, name: Any = "secure"
) -> None:
    cipher: Any = "chacha20" if name == "secure" else None
    generator = make_generator(name, TestKey("a step"), cipher=cipher)
    optimizer.stage(sums, generator, stddev=stddev, divisor=16.0, step=7)


@pytest.mark.parametrize("name", ["secure", "fast"])
def test_the_gradient_is_the_noisy_one_of_the_position_and_the_sum_stays(name: Any) -> None:
    """With β₁ = 0 the first moment is the gradient: that of the kernel which adds noise, to a unit in the last place."""
    from dp_flash_attention.noise.kernels import write_normals
    from dp_flash_attention.noise.targets import float32_two_variance

    (first, one), (second, two) = parts(5), parts()
    optimizer = NoisyAdamW([first, second], betas=(0.0, 0.9))
    before = two.clone()
    staged(optimizer, {first: one, second: two}, name=name)
    optimizer.step()
    assert torch.equal(two, before)
    cipher: Any = "chacha20" if name == "secure" else None
    key = make_generator(name, TestKey("a step"), cipher=cipher).kernel_key(7)  # type: ignore[attr-defined]
    write_normals(two, two_variance=float32_two_variance(0.5), key=key, stream=1, add=True)
    torch.testing.assert_close(optimizer.state[second]["exp_avg"], two / 16.0, rtol=2.0**-23, atol=0)


def test_a_warm_call_starts_from_its_own_numbers() -> None:
    # Planted defects of this kind sum into what the last call left; here it would be the moments of another run.
    results = []
    for scale in (1.0, 100.0, 1.0):
        torch.manual_seed(0)
        parameter, total = parts()
        optimizer = NoisyAdamW([parameter])
        staged(optimizer, {parameter: scale * total}, name="fast")
        optimizer.step()
        state = optimizer.state[parameter]
        results.append(torch.cat([parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]))
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def test_programs_that_did_not_run_are_seen(monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    kernel = kernel_module.noisy_adamw_kernel

    class OneProgramLess:
        def __getitem__(self, grid: Any) -> Any:
            return kernel[(grid[0] - 1,)]

    monkeypatch.setattr(kernel_module, "noisy_adamw_kernel", OneProgramLess())
    assert "misses float64" in str(selfcheck.disagreement("cpu", "chacha20"))


def test_nothing_beyond_the_end_is_touched() -> None:
    room = [torch.full((4110,), float("nan")) for _ in range(4)]
    for buffer in room:
        buffer[:4101] = torch.rand(4101)
    parameter = nn.Parameter(room[0][:4101])
    optimizer = NoisyAdamW([parameter])
    optimizer.state[parameter] = {
        "step": torch.tensor(0.0), "exp_avg": room[1][:4101], "exp_avg_sq": room[2][:4101]
    }  # fmt: skip
    staged(optimizer, {parameter: room[3][:4101]})
    optimizer.step()
    for buffer in room:
        assert torch.isfinite(buffer[:4101]).all()
        assert torch.isnan(buffer[4101:]).all()


@pytest.mark.parametrize("cipher", ["chacha20", "philox4x64"])
def test_the_check_agrees(cipher: Any, unchecked: None) -> None:
    assert selfcheck.disagreement("cpu", cipher) is None


def no_noise(*args: Any, two_variance: Any, **kwargs: Any) -> None:
    kernel_module.noisy_adamw_(*args, two_variance=0.0 * two_variance, **kwargs)


def weak_noise(*args: Any, two_variance: Any, **kwargs: Any) -> None:
    kernel_module.noisy_adamw_(*args, two_variance=0.25 * two_variance, **kwargs)


def raw_sum(*args: Any, divisor: float, **kwargs: Any) -> None:
    kernel_module.noisy_adamw_(*args, divisor=1.0, **kwargs)


def another_stream(*args: Any, stream: int, **kwargs: Any) -> None:
    kernel_module.noisy_adamw_(*args, stream=stream + 1, **kwargs)


@pytest.mark.parametrize("planted", [no_noise, weak_noise, raw_sum, another_stream])
def test_a_wrong_kernel_releases_nothing(
    planted: Any, monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    monkeypatch.setattr(selfcheck, "noisy_adamw_", planted)
    parameter, total = parts(9)
    before = parameter.detach().clone()
    optimizer = NoisyAdamW([parameter])
    with pytest.raises(NoiseUnavailableError, match="misses float64"):
        staged(optimizer, {parameter: total}, name="fast")
    with pytest.raises(RunStateError, match="no sums"):
        optimizer.step()
    assert torch.equal(parameter, before)


def test_a_failure_in_the_middle_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    session = make_private(model, NoisyAdamW(model.parameters()), plan(), keys=RunKeys(TestKey("broken")))
    step = next(steps_of(session))
    kernel, launches = kernel_module.noisy_adamw_kernel, []

    class OutOfMemory:
        def __getitem__(self, grid: Any) -> Any:
            if launches:
                raise MemoryError
            launches.append(grid)
            return kernel[grid]

    selfcheck.disagreement("cpu", "chacha20")
    monkeypatch.setattr(kernel_module, "noisy_adamw_kernel", OutOfMemory())
    with pytest.raises(MemoryError):
        session.apply(step)
    assert session.step_index == 0
    monkeypatch.undo()
    with pytest.raises(NoiseReuseError, match="noise of step 0"):
        session.apply(step)


def test_raw_gradients_are_never_taken() -> None:
    model = small_model()
    optimizer = NoisyAdamW(model.parameters())
    loss_fn(model, RECORDS).sum().backward()
    with pytest.raises(RunStateError, match="never takes raw"):
        optimizer.step()
    session = make_private(model, optimizer, plan(), keys=RunKeys(TestKey("foreign")))
    with pytest.raises(RunStateError, match=r"outside of session\.apply"):
        optimizer.step()
    step = next(steps_of(session))
    session.apply(step)
    with pytest.raises(RunStateError):
        session.apply(step)


def test_autograd_notices_that_parameters_moved() -> None:
    parameter, total = parts(3)
    product = (parameter * parameter).sum()
    optimizer = NoisyAdamW([parameter])
    staged(optimizer, {parameter: total})
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_what_does_not_fit_is_refused_before_anything_moves() -> None:
    with pytest.raises(InvalidInputError, match="float32"):
        NoisyAdamW([nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))])
    parameter, total = parts(6)
    optimizer = NoisyAdamW([parameter])
    for sums in ({}, {parameter: total.double()}, {parameter: total.view(3, 2).mT}):
        with pytest.raises(InvalidInputError):
            staged(optimizer, sums)
    with pytest.raises(NoiseUnavailableError, match="chacha20"):
        optimizer.stage(
            {parameter: total}, make_generator("secure", TestKey("aes")), stddev=1.0, divisor=1.0, step=0
        )
    for name in ("amsgrad", "maximize", "capturable", "fused"):
        optimizer.param_groups[0][name] = True
        with pytest.raises(InvalidInputError, match=name):
            staged(optimizer, {parameter: total})
        optimizer.param_groups[0][name] = False
    model = small_model()
    with pytest.raises(InvalidInputError, match="NoisyAdamW"):
        make_private(model, NoisyAdamW(model.parameters()), plan("exact"), keys=RunKeys(TestKey("exact")))


def test_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noisy_adamw, "_is_on_gpu", lambda tensor: tensor.is_cuda)
    with pytest.raises(InvalidInputError, match="fused=True on a CPU"):
        NoisyAdamW(small_model().parameters())
