"""Compiles the kernels as the launchers ask for them, for an sm_90 that is not there, and prints what was compiled.

What a launcher passes decides the types: a number above 2^31 is wider than one below, a one becomes a constant, a multiple of
16 another variant. Run by ``test_kernels_compile.py`` in a process of its own.
"""

import itertools
import json
import sys
from importlib import import_module

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dp_flash_attention.attention.interface import AttentionCall, NoiseStream, RowNorms
from dp_flash_attention.attention.kernels import add_noise, launch, launch_backward, launch_split, operands
from dp_flash_attention.noise import DiscreteGaussianGenerator, SecureNormalGenerator, TestKey
from dp_flash_attention.noise.device import KernelKey
from dp_flash_attention.noise.kernels import exact_writer, writer

KEY = TestKey("launch")


class DriverWithoutDevice:
    """What Triton asks of a driver before it compiles."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class CompileOnly:
    """A kernel whose launches stop after the compilation; remembers what was compiled."""

    def __init__(self, kernel):
        self._kernel = kernel
        self.compiled = []

    def __getitem__(self, grid):
        def warm_up(*args, **kwargs):
            self.compiled.append(self._kernel.warmup(*args, grid=grid, **kwargs))

        return warm_up

    def variants(self):
        return len({binary.hash for binary in self.compiled})


def compile_only(module, name):
    kernel = CompileOnly(getattr(module, name))
    setattr(module, name, kernel)
    return kernel


def noise(kernel):
    words = ((2**32 - 1, 2**31, 1, 0, 16, 5, 7, 9), (1,) * 8, (0,) * 8, (16,) * 8)
    for key, step, stream in itertools.product(words, (0, 1, 2**63 - 1), (0, 1, 2**32 - 1)):
        writer.write_normals(
            torch.zeros(4096),
            two_variance=np.float32(2.0),
            key=KernelKey(cipher="chacha20", words=key, step=step),
            stream=stream,
            add=True,
        )
    types = kernel.compiled[0].src.signature
    return {"variants": kernel.variants(), "types": [types[name] for name in ("k0", "k7", "stream", "step")]}


def noisy_updates(module, kernel):
    words = ((2**32 - 1, 2**31, 1, 0, 16, 5, 7, 9), (1,) * 8, (0,) * 8, (16,) * 8)
    numbers = itertools.product(words, (0, 1, 2**63 - 1), (0, 1, 2**32 - 1), (1.0, 0.1), (1, 1000))
    for key, step, stream, rate, num_steps in numbers:
        module.noisy_adamw_(
            *(torch.zeros(4096) for _ in range(4)),
            two_variance=np.float32(2.0),
            divisor=16.0 if rate == 1.0 else 3.0,
            moments=module.Moments(
                learning_rate=rate, betas=(0.9, 0.99), eps=1e-8, weight_decay=1.0 - rate, num_steps=num_steps
            ),
            key=KernelKey(cipher="chacha20", words=key, step=step),
            stream=stream,
        )
    types = kernel.compiled[0].src.signature
    names = ("k0", "stream", "step", "divisor", "step_size")
    return {"variants": kernel.variants(), "types": [types[name] for name in names]}


def exact_noise(kernel):
    words = ((2**32 - 1, 2**31, 1, 0, 16, 5, 7, 9), (1,) * 8, (0,) * 8, (16,) * 8)
    for stddev in (4, 16, 40, 300):
        made = DiscreteGaussianGenerator(KEY, stddev=stddev, cipher="chacha20")
        layers = made.certificate.layers
        tables = exact_writer.KernelTables.build(made.tables, layers.multiplier, torch.device("cpu"))
        for key, stream in itertools.product(words, (0, 1, 2**32 - 1)):
            exact_writer.write_discrete_gaussian(
                torch.zeros(4096, dtype=torch.int64),
                tables=tables,
                key=KernelKey(cipher="chacha20", words=key, step=0),
                stream=stream,
                add=True,
            )
    types = kernel.compiled[0].src.signature
    names = ("k0", "k7", "stream", "multiplier")
    return {"variants": kernel.variants(), "types": [types[name] for name in names]}


def attention(shapes, dtypes):
    places = {
        "forward": (launch, "dp_attention_fwd_kernel"),
        "part": (launch_split, "dp_attention_part_kernel"),
        "merge": (launch_split, "dp_attention_merge_kernel"),
        "backward query": (launch_backward, "dp_attention_bwd_query_kernel"),
        "backward rows": (launch_backward, "dp_attention_bwd_rows_kernel"),
    }
    kernels = {name: compile_only(*place) for name, place in places.items()}
    generator = SecureNormalGenerator(KEY, cipher="chacha20")
    for (batch, heads, groups, queries, rows, width, value_width, masked), dtype in itertools.product(
        shapes, dtypes
    ):
        call = AttentionCall(
            query=torch.zeros(batch, heads, queries, width, dtype=dtype),
            key=torch.zeros(batch, groups, rows, width, dtype=dtype),
            value=torch.zeros(batch, groups, rows, value_width, dtype=dtype),
            norms=RowNorms(query=1.0, key=1.0, value=1.0),
            scale=1.0,
            score_bound=1.0,
            causal=masked,
            hidden=torch.zeros(batch, rows, dtype=torch.bool) if masked else None,
            null_rows=1.0,
            stddev=torch.ones(()).expand(batch, heads, queries),
            noise=NoiseStream(key=KEY, name="secure", cipher="chacha20", call_id=0, generator=generator),
            out_dtype=torch.float32,
        )
        for factors in ("inline", "ahead"):
            launch.attention_forward(call, factors=factors, splits=1, with_lse=True)
            if not masked:
                launch.attention_forward(call, factors=factors, splits=2, with_lse=True)
        launch_backward.attention_backward(call, torch.zeros(batch, heads, queries, value_width, dtype=dtype))
    return {name: len(kernel.compiled) for name, kernel in kernels.items()}


def added_noise(kernel, dtypes):
    key = KernelKey(cipher="chacha20", words=(2**32 - 1,) * 8, step=0)
    for shape, dtype in itertools.product(((1, 1, 1, 1), (2, 3, 300, 64)), dtypes):
        out = torch.zeros(shape, dtype=dtype)
        add_noise.add_noise_on_device(out, out, torch.ones(()).expand(shape[:3]), key)
    return {"compiled": len(kernel.compiled)}


def norms(module, name, kernel):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size, rows, inputs, outputs in ((1, 1, 1, 1), (2, 17, 5, 3), (2, 129, 64, 128)):
            getattr(module, name)(
                torch.zeros(size, rows, inputs, dtype=dtype), torch.zeros(size, rows, outputs, dtype=dtype)
            )
    return {"compiled": len(kernel.compiled)}


def embedding_norms(module, kernel):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size, rows, width in ((1, 1, 1), (2, 17, 5), (2, 128, 256)):
            ids = torch.zeros(size, rows, dtype=torch.long)
            module.embedding_norm(ids, torch.zeros(size, rows, width, dtype=dtype))
    return {"compiled": len(kernel.compiled)}


def tied_cross_terms(module, kernel):
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for e, h in (*((dtype, dtype) for dtype in dtypes), (torch.float32, torch.bfloat16)):
        for size, tokens, rows, width, vocabulary in (
            (1, 1, 1, 1, 1),
            (2, 17, 5, 3, 9),
            (2, 64, 128, 64, 96),
        ):
            module.tied_cross(
                torch.zeros(size, tokens, dtype=torch.long),
                torch.zeros(size, tokens, width, dtype=e),
                torch.zeros(size, rows, width, dtype=h),
                torch.zeros(size, rows, vocabulary, dtype=h),
            )
    return {"compiled": len(kernel.compiled)}


def norm_layers(module, kernel):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size, rows, width in ((1, 1, 1), (2, 17, 5), (2, 64, 256)):
            for centred, with_input in itertools.product((True, False), repeat=2):
                x, row = torch.zeros(size, rows, width, dtype=dtype), torch.zeros(size, rows)
                module.norm_backward(
                    x,
                    x,
                    mean_BT=row if centred else None,
                    rstd_BT=row,
                    weight_D=torch.zeros(width),
                    with_input=with_input,
                )
    return {"compiled": len(kernel.compiled)}


def weighted_grads(module, kernel):
    for size, rows, inputs, outputs in ((1, 1, 1, 1), (2, 17, 5, 3), (2, 129, 64, 128), (1, 64, 2048, 2048)):
        for fresh in (False, True):
            module.weighted_grad(
                torch.zeros(size, rows, inputs, dtype=torch.bfloat16),
                torch.zeros(size, rows, outputs, dtype=torch.bfloat16),
                torch.ones(size),
                torch.zeros(outputs, inputs),
                fresh=fresh,
            )
    return {"compiled": len(kernel.compiled)}


def main():
    driver.set_active(DriverWithoutDevice())
    for module in (writer, add_noise):  # nothing runs, so nothing can agree with the CPU
        module.require_agreement = lambda *args: None
    exact_writer.disagreement = lambda *args: None
    found = {"noise": noise(compile_only(writer, "write_normals_kernel"))}
    update = import_module("dp_flash_attention.training.kernels.noisy_adamw")
    found["noisy update"] = noisy_updates(update, compile_only(update, "noisy_adamw_kernel"))
    found["exact noise"] = exact_noise(compile_only(exact_writer, "write_discrete_gaussian_kernel"))
    embedding = import_module("dp_flash_attention.clipping.kernels.embedding_norm")
    found["embedding_norm"] = embedding_norms(embedding, compile_only(embedding, "embedding_norm_kernel"))
    tied = import_module("dp_flash_attention.clipping.kernels.tied_cross")
    found["tied_cross"] = tied_cross_terms(tied, compile_only(tied, "tied_cross_kernel"))
    layer = import_module("dp_flash_attention.clipping.kernels.norm_backward")
    found["norm_backward"] = norm_layers(layer, compile_only(layer, "norm_backward_kernel"))
    compile_only(operands, "row_factors_kernel")
    adding = compile_only(add_noise, "add_noise_kernel")
    found["added noise"] = added_noise(adding, (torch.float32, torch.bfloat16, torch.float16))
    if sys.argv[1:] == ["--all"]:
        shapes = [
            (1, 1, 1, 1, 1, 1, 16, False),
            (1, 1, 1, 1, 1, 16, 16, True),
            (2, 4, 1, 1, 9000, 64, 128, False),
            (1, 1, 1, 3, 0, 24, 32, False),
            (2, 4, 2, 300, 300, 80, 64, True),
        ]
        found["attention"] = attention(shapes, (torch.bfloat16, torch.float16, torch.float32))
        for name in ("gram_norm", "outer_norm"):
            module = import_module(f"dp_flash_attention.clipping.kernels.{name}")
            found[name] = norms(module, name, compile_only(module, f"{name}_kernel"))
        weighted = import_module("dp_flash_attention.clipping.kernels.weighted_grad")
        found["weighted_grad"] = weighted_grads(weighted, compile_only(weighted, "weighted_grad_kernel"))
    else:
        found["attention"] = attention([(1, 1, 1, 1, 1, 16, 16, False)], (torch.bfloat16,))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
