"""Quantized weights in MLX's format: `isomorph.quantize(source, target, bits=4)`.

    recipe -> plan (which matrix gets what, sizes to the byte) -> stream (one matrix at a time) -> write

`arrays` quantizes and dequantizes whole arrays bit for bit as MLX does; `affine` and `microscaling` are the formats,
`packing` the bits, `roles` the names recipes use for any architecture, `named` the built-in recipes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from isomorph.stage import callable_module

if TYPE_CHECKING:
    from isomorph.quantize.write import quantize as quantize
else:
    # The checkpoint reader uses the formats below; what writes uses the reader, so it is imported when called.
    def quantize(*arguments: Any, **options: Any) -> Any:
        """Write a quantized model folder: see `isomorph.quantize.write.quantize` for the arguments."""
        from isomorph.quantize.write import quantize as write

        return write(*arguments, **options)


callable_module(__name__)
