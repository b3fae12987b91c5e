"""Compiles every kernel for sm_90 without a GPU and prints what the binary is made of, as JSON.

Run by ``test_kernels_compile.py`` in a process of its own, as the tests' process runs Triton's interpreter.
"""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dp_flash_attention.attention.kernels import backward, launch, launch_backward, launch_split, split
from dp_flash_attention.attention.kernels.forward import dp_attention_fwd_kernel
from dp_flash_attention.attention.kernels.row_factors import row_factors_kernel
from dp_flash_attention.noise.kernels import exact_writer, transform
from dp_flash_attention.noise.kernels.discrete_gaussian import write_discrete_gaussian_kernel
from dp_flash_attention.noise.kernels.writer import _NUM_WARPS, _TILES_PER_PROGRAM, write_normals_kernel

# The package's names for these modules are its functions.
embedding_norm = import_module("dp_flash_attention.clipping.kernels.embedding_norm")
gram_norm = import_module("dp_flash_attention.clipping.kernels.gram_norm")
norm_backward = import_module("dp_flash_attention.clipping.kernels.norm_backward")
noisy_adamw = import_module("dp_flash_attention.training.kernels.noisy_adamw")
outer_norm = import_module("dp_flash_attention.clipping.kernels.outer_norm")
tied_cross = import_module("dp_flash_attention.clipping.kernels.tied_cross")
weighted_grad = import_module("dp_flash_attention.clipping.kernels.weighted_grad")

TARGET = GPUTarget("cuda", 90, 32)
COUNTS = ("num_heads", "heads_per_group", "num_groups")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(kernel, types, constants, *, num_warps, num_stages=3):
    """Returns counts of one compiled variant."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    # Tensors that torch allocates are aligned to 16 bytes, and the usual sizes are multiples of 16; the launcher tells the
    # compiler the same. Without it, nothing would be copied asynchronously.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name not in COUNTS and signature[name] == "i32")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=TARGET, options={"num_warps": num_warps, "num_stages": num_stages})
    cubin = Path("kernel.cubin")
    cubin.write_bytes(binary.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared_bytes": binary.metadata.shared,
        "barriers": binary.asm["ptx"].count("bar.sync"),
        "loads": binary.asm["ptx"].count("ld.global"),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", binary.asm["ptx"])),
        "wgmma": binary.asm["ptx"].count("wgmma.mma_async"),
    }


KEY_TYPES = {f"k{i}": "u32" for i in range(8)} | {"stream": "u32", "step": "u64", "two_variance": "fp32"}


@triton.jit
def lanes_without_anchor(anchor, LANES: tl.constexpr):
    return tl.arange(0, LANES).to(tl.uint64)


@triton.jit
def adds_to_memory(out):
    tl.atomic_add(out, 1.0)


def noise_kernels():
    for cipher in ("chacha20", "philox4x64"):
        for add in (False, True):
            yield (
                f"write_normals/{cipher}/{'add' if add else 'fill'}",
                compiled(
                    write_normals_kernel,
                    {"out": "*fp32", "total": "i64", **KEY_TYPES},
                    {"CIPHER": cipher, "ADD": add, "TILES": _TILES_PER_PROGRAM},
                    num_warps=_NUM_WARPS,
                ),
            )


def noisy_adamw_kernels():
    types = dict.fromkeys(("parameter", "sums", "first", "second"), "*fp32") | {"total": "i64", **KEY_TYPES}
    scalars = ("divisor", "shrink", "keep_first", "keep_second", "step_size", "root", "eps")
    types |= dict.fromkeys(scalars, "fp32")
    for cipher in ("chacha20", "philox4x64"):
        yield (
            f"noisy_adamw/{cipher}",
            compiled(
                noisy_adamw.noisy_adamw_kernel,
                types,
                {"CIPHER": cipher, "TILES": noisy_adamw.TILES_PER_PROGRAM},
                num_warps=noisy_adamw.NUM_WARPS,
            ),
        )


def exact_noise_kernels():
    types = {"out": "*i64", "total": "i64", "hot": "*i32", "rest": "*i64", "direct": "*i32"}
    types |= dict.fromkeys(("num_layers", "num_hot", "num_rest", "multiplier"), "i32")
    types |= {name: KEY_TYPES[name] for name in ("stream", *(f"k{i}" for i in range(8)))}
    for add in (False, True):
        yield (
            f"write_discrete_gaussian/{'add' if add else 'fill'}",
            compiled(write_discrete_gaussian_kernel, types, {"ADD": add}, num_warps=exact_writer._NUM_WARPS),
        )


def attention_kernels():
    """Yields variants that plans and benchmarks meet most, launched as ``launch.py`` launches them."""
    bf16 = torch.bfloat16
    yield "attention/64, causal", attention_kernel(bf16, 64, True, False, "chacha20")
    yield "attention/128, inline", attention_kernel(bf16, 128, False, True, "chacha20")
    yield (
        "attention/64, hidden, passes",
        attention_kernel(bf16, 64, False, False, "chacha20", hidden=True, passes=8192),
    )
    yield "row_factors", row_factors_variant()


def all_attention_kernels():
    for dtype, width in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 128)):
        for causal in (False, True):
            for inline in (False, True):
                for cipher in ("chacha20", "philox4x64", None):
                    name = f"attention/{dtype}, {width}, {causal=}, {inline=}, {cipher}"
                    yield name, attention_kernel(dtype, width, causal, inline, cipher)
    yield "attention/float32", attention_kernel(torch.float32, 64, False, False, "philox4x64")
    yield "attention/256", attention_kernel(torch.bfloat16, 256, False, False, "chacha20")
    yield "attention/one query", attention_kernel(torch.bfloat16, 64, False, True, "chacha20", queries=1)


def row_factors_variant():
    return compiled(
        row_factors_kernel,
        {
            "x": "*bf16",
            "out": "*fp32",
            "norm": "fp32",
            **dict.fromkeys(("stride_b", "stride_g", "stride_k", "num_groups", "num_rows"), "i32"),
        },
        {"WIDTH": 64, "BLOCK_WIDTH": 64, "BLOCK_ROWS": 128, "stride_d": 1},
        num_warps=4,
    )


def attention_kernel(dtype, width, causal, inline, cipher, *, queries=4096, hidden=False, passes=None):
    element = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    block_m, block_n, num_warps = launch.block_shape(queries, width, width, dtype, inline=inline)
    constants = {
        "WIDTH": width,
        "BLOCK_D": width,
        "BLOCK_E": width,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "PASS_ROWS": passes,
        "CAUSAL": causal,
        "HAS_HIDDEN": hidden,
        "INLINE_FACTORS": inline,
        "STORE_LSE": False,
        "CIPHER": cipher,
        "PRECISION": "ieee",
        **dict.fromkeys(("stride_qd", "stride_kd", "stride_ve"), 1),  # rows of contiguous numbers
    }
    types = {
        name: "i32"
        for name in dp_attention_fwd_kernel.arg_names
        if name.startswith(("stride", "num", "heads"))
    }
    types |= dict.fromkeys(("query", "key", "value", "out"), f"*{element}")
    types |= dict.fromkeys(("lse", "key_factors", "value_factors", "stddev"), "*fp32")
    types |= dict.fromkeys(
        ("query_norm", "key_norm", "value_norm", "scale_log2", "shift_log2", "null_weight"), "fp32"
    )
    types |= {"hidden": "*u8", **KEY_TYPES}
    return compiled(
        dp_attention_fwd_kernel, types, constants, num_warps=num_warps, num_stages=launch.NUM_STAGES
    )


def rows_types(kernel, dtype, scalars):
    """Returns the types of an attention kernel's arguments but the key."""
    element = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    types = {name: "i32" for name in kernel.arg_names if name.startswith(("stride", "num", "heads", "split"))}
    wide = ("lse", "stddev", "inverses", "deltas", "part_sums", "part_weights")
    narrow = ("query", "key", "value", "out", "grad_out", "clipped_out", "clipped")
    narrow += ("grad_query", "grad_key", "grad_value")
    types |= dict.fromkeys((*wide, "key_factors", "value_factors"), "*fp32")
    types |= dict.fromkeys(narrow, f"*{element}")
    types |= dict.fromkeys(scalars, "fp32")
    return {name: kind for name, kind in (types | {"hidden": "*u8"}).items() if name in kernel.arg_names}


def tile_constants(kernel, width, block_m, block_n, hidden):
    constants = {"WIDTH": width, "BLOCK_D": width, "BLOCK_E": width, "BLOCK_M": block_m, "BLOCK_N": block_n}
    constants |= {"HAS_HIDDEN": hidden, "PRECISION": "ieee", "stride_kd": 1, "stride_ve": 1, "stride_qd": 1}
    return {name: value for name, value in constants.items() if name in kernel.arg_names}


def backward_kernels(dtype, width, causal, *, queries=4096):
    """Yields both kernels of the backward pass as ``launch_backward.py`` launches them."""
    for name, kernel, blocks in (
        (
            "query",
            backward.dp_attention_bwd_query_kernel,
            launch_backward.query_blocks(queries, width, width, dtype),
        ),
        ("rows", backward.dp_attention_bwd_rows_kernel, launch_backward.row_blocks(width, width, dtype)),
    ):
        constants = tile_constants(kernel, width, blocks[0], blocks[1], hidden=not causal)
        constants |= {"CAUSAL": causal} | ({"NEEDS_QUERY": True} if name == "query" else {})
        yield (
            f"attention backward, {name}/{dtype}, {width}, {causal=}",
            compiled(
                kernel,
                rows_types(kernel, dtype, backward.SCALARS),
                constants,
                num_warps=blocks[2],
                num_stages=launch_backward.NUM_STAGES,
            ),
        )


def part_kernel(dtype, width, inline, *, queries=4096):
    kernel = split.dp_attention_part_kernel
    block_m, block_n = launch_split.part_blocks(queries, width, width, dtype)
    constants = tile_constants(kernel, width, block_m, block_n, hidden=True)
    constants |= {"PASS_ROWS": launch_split.PASS_ROWS, "INLINE_FACTORS": inline}
    types = rows_types(kernel, dtype, split.PART_SCALARS)
    return compiled(
        kernel, types, constants, num_warps=launch_split.NUM_WARPS, num_stages=launch_split.NUM_STAGES
    )


def merge_kernel(width):
    kernel = split.dp_attention_merge_kernel
    rows = launch_split.MERGE_TILES * 2048 // width
    constants = {"BLOCK_E": width, "BLOCK_M": rows, "STORE_LSE": False, "CIPHER": "chacha20"}
    types = rows_types(kernel, torch.float32, ("shift_log2", "null_weight"))
    types |= {name: kind for name, kind in KEY_TYPES.items() if name in kernel.arg_names}
    return compiled(kernel, types, constants, num_warps=launch_split.NUM_WARPS)


def more_attention_kernels():
    """Yields the variants of the backward pass and of the ranges that calls meet most."""
    yield from backward_kernels(torch.bfloat16, 64, True)
    yield "attention part/64, ahead", part_kernel(torch.bfloat16, 64, False)
    yield "attention merge/64", merge_kernel(64)
    yield "attention/float16, 64", attention_kernel(torch.float16, 64, False, False, "chacha20")


def all_more_attention_kernels():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (64, 128, 256):
            yield from backward_kernels(dtype, width, causal=width != 128)
            inline = dtype is torch.float16
            yield f"attention part/{dtype}, {width}, {inline=}", part_kernel(dtype, width, inline)
    yield "attention part/one query", part_kernel(torch.bfloat16, 64, True, queries=1)
    for width in (16, 256):
        yield f"attention merge/{width}", merge_kernel(width)
    for width in (64, 128):
        name = f"attention/float16, {width}, causal"
        yield name, attention_kernel(torch.float16, width, True, False, "chacha20")


def norm_kernels():
    for dtype in ("bf16", "fp32"):
        for form, module, blocks in (
            ("gram", gram_norm, ("BLOCK_ROWS", "BLOCK_WIDTH")),
            ("outer", outer_norm, ("BLOCK_OUTPUTS", "BLOCK_INPUTS", "BLOCK_ROWS")),
        ):
            types = dict.fromkeys(("stride_xb", "stride_xt", "stride_gb", "stride_gt"), "i32")
            types |= dict.fromkeys(("num_rows", "num_inputs", "num_outputs"), "i32")
            types |= {"x": f"*{dtype}", "g": f"*{dtype}", "partial": "*fp32"}
            constants = {"stride_xd": 1, "stride_gp": 1} | {name: getattr(module, name) for name in blocks}
            kernel = getattr(module, f"{form}_norm_kernel")
            yield (
                f"{form}_norm/{dtype}",
                compiled(kernel, types, constants, num_warps=module.NUM_WARPS, num_stages=module.NUM_STAGES),
            )


def embedding_norm_kernels():
    for dtype in ("bf16", "fp16", "fp32"):
        types = dict.fromkeys(("stride_gb", "stride_gt", "num_rows", "width"), "i32")
        types |= {"ids": "*i64", "order": "*i64", "g": f"*{dtype}", "partial": "*fp32"}
        constants = {"stride_gd": 1, "BLOCK_WIDTH": embedding_norm.BLOCK_WIDTH}
        yield (
            f"embedding_norm/{dtype}",
            compiled(
                embedding_norm.embedding_norm_kernel, types, constants, num_warps=embedding_norm.NUM_WARPS
            ),
        )


def tied_cross_kernels():
    strides = [f"stride_{name}" for name in ("eb", "et", "hb", "hs", "gb", "gs")]
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for e, h in (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16")):
        width, num_warps = tied_cross.width_and_warps(dtypes[e], dtypes[h])
        blocks = {"BLOCK_ROWS": tied_cross.BLOCK_ROWS, "BLOCK_WIDTH": width}
        types = dict.fromkeys((*strides, "num_tokens", "num_rows", "width"), "i32")
        types |= {"ids": "*i64", "e": f"*{e}", "h": f"*{h}", "g": f"*{h}", "partial": "*fp32"}
        constants = {"stride_ed": 1, "stride_hd": 1, "stride_gv": 1, "MIXED": e != h} | blocks
        yield (
            f"tied_cross/{e}, {h}",
            compiled(
                tied_cross.tied_cross_kernel,
                types,
                constants,
                num_warps=num_warps,
                num_stages=tied_cross.NUM_STAGES,
            ),
        )


def norm_backward_kernels():
    for dtype, width, centred in (
        ("bf16", 768, True),
        ("fp32", 768, True),
        ("bf16", 4096, False),
        ("fp32", 8192, True),
    ):
        block_rows, block_width, num_warps = norm_backward.block_shape(width)
        types = dict.fromkeys(("num_rows", "width"), "i32")
        types |= dict.fromkeys(("x", "g", "grad_x"), f"*{dtype}")
        types |= dict.fromkeys(("mean", "rstd", "weight", "gains", "biases"), "*fp32")
        constants = {
            "HAS_MEAN": centred,
            "STORE_INPUT": True,
            "ROWS_PER_PROGRAM": norm_backward.ROWS_PER_PROGRAM,
        }
        constants |= {"BLOCK_ROWS": block_rows, "BLOCK_WIDTH": block_width}
        yield (
            f"norm_backward/{dtype}, {width}{'' if centred else ', rms'}",
            compiled(norm_backward.norm_backward_kernel, types, constants, num_warps=num_warps),
        )


def weighted_grad_kernels():
    types = dict.fromkeys(("stride_xb", "stride_xt", "stride_gb", "stride_gt", "size", "num_rows"), "i32")
    types |= dict.fromkeys(("num_inputs", "num_outputs", "examples_per_run"), "i32")
    types |= {"x": "*bf16", "g": "*bf16", "factors": "*fp32", "out": "*fp32"}
    constants = {"stride_xd": 1, "stride_gp": 1}
    constants |= {
        name: getattr(weighted_grad, name) for name in ("BLOCK_OUTPUTS", "BLOCK_INPUTS", "BLOCK_ROWS")
    }
    for add in (False, True):
        yield (
            f"weighted_grad/{'add' if add else 'fresh'}",
            compiled(
                weighted_grad.weighted_grad_kernel,
                types,
                {**constants, "ADD": add},
                num_warps=weighted_grad.NUM_WARPS,
                num_stages=weighted_grad.NUM_STAGES,
            ),
        )


def main():
    if sys.argv[1:] == ["--more-attention"]:  # by hand, after a change of block sizes
        found = [*more_attention_kernels(), *all_more_attention_kernels()]
    elif sys.argv[1:] == ["--without-anchor"]:  # a planted loss of speed: see test_kernels_compile.py
        transform._anchored_lanes = lanes_without_anchor
        found = [next(noise_kernels())]
    elif sys.argv[1:] == ["--with-an-atomic"]:  # planted: the count has to see it
        found = [("planted", compiled(adds_to_memory, {"out": "*fp32"}, {}, num_warps=4))]
    elif sys.argv[1:] == ["--all"]:
        found = [
            *noise_kernels(),
            *noisy_adamw_kernels(),
            *exact_noise_kernels(),
            *attention_kernels(),
            *more_attention_kernels(),
            *norm_kernels(),
            *embedding_norm_kernels(),
            *tied_cross_kernels(),
            *norm_backward_kernels(),
            *weighted_grad_kernels(),
            *all_attention_kernels(),
            *all_more_attention_kernels(),
        ]
    else:
        found = [
            *noise_kernels(),
            *noisy_adamw_kernels(),
            *exact_noise_kernels(),
            *attention_kernels(),
            *more_attention_kernels(),
            *norm_kernels(),
            *embedding_norm_kernels(),
            *tied_cross_kernels(),
            *norm_backward_kernels(),
            *weighted_grad_kernels(),
        ]
    print(json.dumps(dict(found)))


if __name__ == "__main__":
    main()
