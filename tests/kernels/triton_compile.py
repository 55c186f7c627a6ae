"""Run by test_triton.py: compile the kernels as they would be launched, down to machine code for sm_90."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from isomorph.kernels import triton as kernels
from isomorph.quantize.settings import Settings

HOPPER = GPUTarget("cuda", 90, 32)
INTEGERS = ["x_stride", "repeats", "M", "N", "K", "groups_a_split"]


def compile_for(kernel, settings: Settings, experts: bool, **constants) -> dict:
    """The compiler's outputs by kind: `ptx`, `cubin`, ..."""
    words, codes = kernels._unit(settings)
    numbers = "bf16" if settings.affine else "u8"
    pointers = {"x": "*bf16", "y": "*bf16", "words": "*i32", "scales": f"*{numbers}", "indices": "*i64"}
    pointers |= {"biases": f"*{numbers}"} if settings.affine else {}
    pointers |= dict.fromkeys(("experts", "order", "tiles"), "*i64") if experts else {}
    constants |= {"MODE": settings.mode, "BITS": settings.bits, "GROUP": settings.group_size, "WIDE_SCALES": False}
    constants |= {"UNIT_WORDS": words, "UNIT_CODES": codes}
    known = {**pointers, **dict.fromkeys(INTEGERS, "i32")}
    source = ASTSource(
        kernel,
        {name: known.get(name, "constexpr") for name in kernel.arg_names},
        {(i,): constants.get(name) for i, name in enumerate(kernel.arg_names) if name not in known},
    )
    return triton.compile(source, target=HOPPER, options={"num_warps": 8 if constants.get("TILE_M", 0) > 64 else 4}).asm


def main() -> None:
    formats = Settings(4, 64), Settings(5, 32), Settings(4, 32, "mxfp4"), Settings(4, 16, "nvfp4")
    for settings, experts in zip(formats, (False, True, True, False)):
        units = kernels.COLUMNS // kernels._unit(settings)[1]
        tile = kernels._tile(8 if experts else 512)
        one = compile_for(kernels._one_row, settings, experts, ROWS=kernels.ROWS, UNITS=units)
        many = compile_for(kernels._many_rows, settings, experts, FACTOR=tl.bfloat16, TILE_M=tile[0], TILE_N=tile[1])
        rows = compile_for(kernels._dequantize, settings, False, UNITS=units)
        assert all(compiled["cubin"] for compiled in (one, many, rows))
        assert "mma" in many["ptx"], "expected products on the tensor cores"


main()
