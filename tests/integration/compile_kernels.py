"""Compiles every kernel for sm_90 without a GPU and prints what the binary is made of, as JSON.

Run by ``test_kernels_compile.py`` in a process of its own, as the tests' process runs Triton's interpreter.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(kernel, types, constants, *, num_warps, num_stages=3):
    """Returns counts of one compiled variant."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    signature |= {name: "constexpr" for name in constants}
    # Tensors that torch allocates are aligned to 16 bytes; the launcher tells the compiler the same.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
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
        "wgmma": binary.asm["ptx"].count("wgmma.mma_async"),
    }


KEY_TYPES = {f"k{i}": "u32" for i in range(8)} | {"stream": "u32", "step": "u64", "two_variance": "fp32"}


@triton.jit
def lanes_without_anchor(anchor, LANES: tl.constexpr):
    return tl.arange(0, LANES).to(tl.uint64)


def noise_kernels():
    from dp_flash_attention.noise.kernels.writer import _NUM_WARPS, _TILES_PER_PROGRAM, write_normals_kernel

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


def main():
    if sys.argv[1:] == ["--without-anchor"]:  # a planted loss of speed: see test_kernels_compile.py
        from dp_flash_attention.noise.kernels import transform

        transform._anchored_lanes = lanes_without_anchor
    print(json.dumps(dict(noise_kernels())))


if __name__ == "__main__":
    main()
