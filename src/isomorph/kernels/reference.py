"""The products in plain torch: any device, any dtype, and the path where there is no extension."""

from __future__ import annotations

import torch

from isomorph.quantize.settings import Settings

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

#: Weights dequantized at a time, so that a large matrix never exists as floats.
BLOCK_WEIGHTS = 1 << 24


def unpack(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [..., K] of 32-bit words [..., K * bits / 32]: a little-endian stream of bits."""
    stream = weight.contiguous().view(torch.uint8)
    if bits == 8:
        return stream
    # Eight codes are `bits` bytes: one 64-bit integer each.
    eights = stream.reshape(*stream.shape[:-1], -1, bits).to(torch.int64)
    places = torch.arange(bits, device=weight.device) * 8
    words = (eights << places).sum(-1, keepdim=True)
    codes = (words >> (torch.arange(8, device=weight.device) * bits)) & ((1 << bits) - 1)
    return codes.flatten(-2).to(torch.uint8)


def decode_scales(scales: torch.Tensor, mode: str) -> torch.Tensor:
    """Scales as float32."""
    if mode == "affine":
        return scales.float()
    if mode == "nvfp4":
        return scales.view(torch.float8_e4m3fn).float()
    # E8M0: 2 ** (e - 127), and 255 is NaN.
    bits = torch.where(scales == 0, 0x00400000, scales.to(torch.int32) << 23)
    return bits.view(torch.float32).masked_fill(scales == 255, float("nan"))


def dequantize(
    weight: torch.Tensor,
    scales: torch.Tensor,
    biases: torch.Tensor | None,
    settings: Settings,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weights [..., K], computed in float32 and rounded once to `dtype`."""
    codes = unpack(weight, settings.bits)
    if settings.mode in ("mxfp4", "nvfp4"):
        elements = torch.tensor(E2M1, device=weight.device)[codes.long()]
    elif settings.mode == "mxfp8":
        elements = codes.view(torch.float8_e4m3fn).float()
    else:
        elements = codes.float()
    groups = elements.unflatten(-1, (-1, settings.group_size))
    scale = decode_scales(scales, settings.mode)[..., None]
    if biases is None:
        values = groups * scale
    else:
        # In float64, as scale * code + bias may cancel and torch has no fused multiply-add.
        values = torch.addcmul(biases.double()[..., None], groups.double(), scale.double())
    return values.to(torch.float32).flatten(-2).to(dtype)


def linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor | None, settings: Settings
) -> torch.Tensor:
    """`x [M, K] @ dequantized(weight).T -> [M, N]` in x's dtype, with float32 weights and accumulation."""
    rows = max(1, BLOCK_WEIGHTS // max(1, x.shape[-1]))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = x.new_empty((x.shape[0], weight.shape[0]))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        values = dequantize(weight[part], scales[part], None if biases is None else biases[part], settings)
        y[:, part] = wide @ values.to(wide.dtype).T
    return y


def experts_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    biases: torch.Tensor | None,
    experts: torch.Tensor,
    settings: Settings,
) -> torch.Tensor:
    """Row i is row i * M // len(experts) of `x [M, K]` times expert `experts[i]`; only chosen experts are read."""
    y = x.new_empty((experts.shape[0], weight.shape[1]))
    repeats = experts.shape[0] // max(1, x.shape[0])
    for expert in experts.unique().tolist():
        places = (experts == expert).nonzero()[:, 0]
        local = None if biases is None else biases[expert]
        y[places] = linear(x[places // repeats], weight[expert], scales[expert], local, settings)
    return y
