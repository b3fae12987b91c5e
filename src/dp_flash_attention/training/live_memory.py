"""How many bytes of tensors a call holds at its peak, counted by the allocator and not by the operating system."""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak_live_bytes(call: Callable[[], object], *, device: torch.device) -> int:
    """Runs a call and returns by how much the bytes of living tensors rose at most while it ran.

    What the operating system shows (resident memory) is larger by what the allocator cannot give back. On a CPU
    the profiler's allocation events are counted, scratch of libraries inside an operator is not seen; on a CUDA device
    it is the caching allocator's own count.

    Args:
        call: What to run, on ``device``.
        device: Where its tensors live.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        call()
    assert seen.profiler is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    living = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        living += event.nbytes()
        peak = max(peak, living)
    return peak
