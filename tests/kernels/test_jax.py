"""Products in JAX against float64: in jax.numpy, and through XLA's foreign functions in the C++ extension."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from isomorph.kernels import jax as kernels
from isomorph.kernels.extension import find_extension
from isomorph.quantize.settings import MODES, Settings
from kernels.packed import TORCH, Case, activations, make, relative_error

#: As for the C++ kernels and Triton's.
BOUND = 1e-6

ALL_SETTINGS = [
    Settings(bits, size, mode) for mode, (_, _, widths, sizes) in MODES.items() for bits in widths for size in sizes
]

#: Through the extension, where there is one.
EXTENSION = [
    pytest.param(False, id="jax.numpy"),
    pytest.param(
        True,
        id="extension",
        marks=pytest.mark.skipif(find_extension() is None, reason="the C++ extension is not built"),
    ),
]


def array(tensor: torch.Tensor) -> jax.Array:
    if tensor.dtype == torch.bfloat16:
        return jnp.asarray(tensor.view(torch.int16).numpy().view(jnp.bfloat16))
    return jnp.asarray(tensor.numpy().view(np.uint32) if tensor.dtype == torch.int32 else tensor.numpy())


def arrays(case: Case) -> list[jax.Array | None]:
    return [None if part is None else array(part) for part in case.packed]


def tensor(value: jax.Array) -> torch.Tensor:
    return torch.from_numpy(np.array(value.astype(jnp.float32)))


@jax.jit(static_argnames=("settings", "extension"))
def product(x, weight, scales, biases, settings, extension):
    arguments = settings.bits, settings.group_size, settings.mode, extension
    return kernels.quantized_linear(x, weight, scales, biases, *arguments)


@pytest.mark.parametrize("extension", EXTENSION)
@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=str)
def test_products(settings, extension):
    rng = np.random.default_rng(settings.bits * 1000 + settings.group_size)
    for rows, scale_dtype, kind in ((1, "bfloat16", "outlier"), (3, "float32", "onesided"), (18, "float16", "normal")):
        case = make(int(rng.integers(1 << 30)), (27, settings.group_size * 3), settings, scale_dtype, kind)
        x = activations(rows, rows, case.values.shape[1], "float32")
        y = tensor(product(array(x), *arrays(case), settings, extension))
        assert relative_error(y, x, case.values) <= BOUND
        broken = case.values.copy()
        broken[-1, -1] += 1e-3 * np.abs(broken[-1]).sum() + 1e-6
        assert relative_error(y, x, broken) > BOUND


def test_the_extension_is_used():
    if find_extension() is None:
        pytest.skip("the C++ extension is not built")
    settings = Settings(4, 64)
    case = make(0, (8, 128), settings)
    x = jnp.ones((1, 128))
    for extension in (True, False):
        program = product.lower(x, *arrays(case), settings, extension).compile().as_text()
        assert ("isomorph_multiply_all" in program) == extension


@pytest.mark.parametrize("extension", EXTENSION)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_have_the_dtype_of_the_activations(dtype, extension):
    case = make(2, (27, 128), Settings(4, 64))
    for rows in (2, 20):
        x = activations(1, rows, 128, dtype)
        y = product(array(x), *arrays(case), case.settings, extension)
        assert y.dtype == dtype
        exact = x.double().numpy() @ case.values.T
        rounding = 2**-8 if dtype == "bfloat16" else 2**-11
        magnitude = np.abs(x.double().numpy()) @ np.abs(case.values).T
        assert (np.abs(np.asarray(y, np.float64) - exact) <= rounding * np.abs(exact) + BOUND * magnitude).all()


@pytest.mark.parametrize("mode", MODES)
def test_rows_dequantize_with_one_rounding(mode):
    settings = Settings.of(mode=mode)
    call = jax.jit(kernels.dequantize_rows, static_argnums=(4, 5, 6, 7))
    ids = np.array([[28, 0], [-1, 29]])
    for dtype in TORCH:
        case = make(3, (29, settings.group_size * 3), settings, dtype)
        rows = tensor(call(*arrays(case), ids, *case.arguments[3:], dtype))
        expected = torch.from_numpy(case.values.astype(np.float32))[ids[0]].to(TORCH[dtype])
        assert torch.equal(rows[0], expected.float())
        assert rows[1].isnan().all()


@pytest.mark.parametrize("extension", EXTENSION)
@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
@pytest.mark.parametrize("tokens", [2, 80])
def test_only_chosen_experts_are_read(tokens, mode, extension):
    settings = Settings.of(mode=mode)
    case = make(8, (5, 24, 128), settings)
    x = activations(2, tokens, 128, "float32")
    chosen = torch.tensor([[0, 3], [3, 4], [0, 4], [4, 3]]).repeat(20, 1)[:tokens].reshape(-1)
    weight, scales, biases = arrays(case)
    poisoned = scales.at[jnp.array([1, 2])].set(jnp.nan if settings.affine else 255)
    call = jax.jit(kernels.quantized_experts_linear, static_argnums=(5, 6, 7, 8))
    y = tensor(call(array(x), weight, poisoned, biases, array(chosen), *case.arguments[3:], extension))
    for place, expert in enumerate(chosen.tolist()):
        row = x[place // 2 : place // 2 + 1]
        assert relative_error(y[place : place + 1], row, case.values[expert]) <= BOUND
        assert relative_error(y[place : place + 1], row, case.values[(expert + 1) % 5]) > BOUND


@pytest.mark.parametrize("extension", EXTENSION)
def test_gradients_flow_to_the_activations(extension):
    case = make(1, (24, 64), Settings(4, 32))
    x = activations(0, 3, 64, "float32")
    gradient = jax.grad(lambda x: jnp.sum(product(x, *arrays(case), case.settings, extension) ** 2))(array(x))
    values = torch.from_numpy(case.values)
    expected = 2 * (x.double() @ values.T) @ values
    assert torch.allclose(tensor(gradient).double(), expected, rtol=1e-4, atol=1e-4)


def test_products_of_sharded_weights_need_no_gathering():
    settings = Settings(4, 64)
    case = make(5, (32, 256), settings)
    x = activations(0, 2, 256, "float32")
    mesh = jax.make_mesh((len(jax.devices()),), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = [jax.device_put(part, NamedSharding(mesh, PartitionSpec("model", None))) for part in arrays(case)]
    y = product(array(x), *placed, settings, False)
    assert relative_error(tensor(y), x, case.values) <= BOUND
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "model")), 2)


def test_parts_that_do_not_agree_are_refused():
    case = make(1, (8, 128), Settings(4, 64))
    weight, scales, biases = arrays(case)
    with pytest.raises(ValueError, match="agree"):
        kernels.quantized_linear(jnp.ones((1, 128)), weight[:, :-1], scales, biases)
    with pytest.raises(ValueError, match="agree"):
        kernels.quantized_linear(jnp.ones((1, 128)), weight, scales, None)
    with pytest.raises(ValueError, match="128 columns"):
        kernels.quantized_linear(jnp.ones((1, 64)), weight, scales, biases)


#: Our declaration -> XLA's, and our fields -> XLA's.
DECLARATIONS = {
    "Extension": ("Extension_Base", "type:type next:next"),
    "ApiVersion": ("Api_Version", "major_version:major_version minor_version:minor_version"),
    "Metadata": ("Metadata", "api_version:api_version traits:traits"),
    "MetadataExtension": ("Metadata_Extension", "base:extension_base metadata:metadata"),
    "Buffer": ("Buffer", "dtype:dtype data:data rank:rank dims:dims"),
    "Span": ("ByteSpan", "data:ptr size:len"),
    "Scalar": ("Scalar", "dtype:dtype value:value"),
    "Buffers": ("Args", "count:size types:types items:args"),
    "Attributes": ("Attrs", "count:size types:types names:names items:attrs"),
    "ErrorArguments": ("Error_Create_Args", "struct_size:struct_size message:message code:errc"),
    "ScheduleArguments": ("ThreadPool_Schedule_Args", "struct_size:struct_size context:ctx task:task data:data"),
    "ThreadsArguments": ("ThreadPool_NumThreads_Args", "struct_size:struct_size context:ctx count:num_threads"),
    "Api": (
        "Api",
        "version:api_version create_error:XLA_FFI_Error_Create schedule:XLA_FFI_ThreadPool_Schedule "
        "threads:XLA_FFI_ThreadPool_NumThreads",
    ),
    "CallFrame": (
        "CallFrame",
        "extensions:extension_start api:api context:ctx stage:stage arguments:args results:rets attributes:attrs",
    ),
}
CONSTANTS = {
    "kMajor": "API_MAJOR",
    "kMetadataExtension": "Extension_Metadata",
    "kInvalidArgument": "Error_Code_INVALID_ARGUMENT",
    "kFloat16": "DataType_F16",
    "kFloat32": "DataType_F32",
    "kBfloat16": "DataType_BF16",
}


def compiles(folder: Path, declarations: dict[str, tuple[str, str]]) -> bool:
    lines = ['#include "xla_ffi.h"', '#include "xla/ffi/api/c_api.h"', "namespace ours = isomorph::xla;"]
    for own, (theirs, fields) in declarations.items():
        for own_field, field in (pair.split(":") for pair in fields.split()):
            lines.append(f"static_assert(offsetof(ours::{own}, {own_field}) == offsetof(XLA_FFI_{theirs}, {field}));")
    lines += [f"static_assert(int(ours::{own}) == int(XLA_FFI_{theirs}));" for own, theirs in CONSTANTS.items()]
    source = folder / "declarations.cpp"
    source.write_text("\n".join(lines))
    csrc = Path(kernels.__file__).parent / "csrc"
    command = ["c++", "-std=c++17", "-fsyntax-only", f"-I{csrc}", f"-I{jax.ffi.include_dir()}", str(source)]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_our_declarations_are_those_of_xla(tmp_path):
    assert compiles(tmp_path, DECLARATIONS)
    assert not compiles(tmp_path, DECLARATIONS | {"Buffer": ("Buffer", "dtype:data")})
