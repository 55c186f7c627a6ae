"""A folded weight and its sidecar give back weight and gain, bit for bit, whatever the bits."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isomorph import InputError
from isomorph.checkpoint import NUMPY_DTYPES, Tensor, from_array
from isomorph.checkpoint import tensor as tensor_module
from isomorph.port import fold

FLOATS = ("bfloat16", "float16", "float32", "float64")


def fold_and_back(folder: Path, weight: np.ndarray, gain: np.ndarray) -> tuple[np.ndarray, list[Tensor]]:
    tensors = from_array("lm_head", weight), from_array("w_g", gain)
    whole = fold.folded("lm_head.weight", *tensors).read()
    path = folder / "lm_head_fold.npz"
    path.unlink(missing_ok=True)
    writer = fold.sidecar_writer(*tensors)
    if writer is not None:
        writer(path)
    return whole, fold.unfolded(from_array("lm_head.weight", whole), ("lm_head", "w_g"), folder)


def assert_restored(parts: list[Tensor], weight: np.ndarray, gain: np.ndarray) -> None:
    for part, value in zip(parts, (weight, gain), strict=True):
        assert part.dtype == str(value.dtype)
        assert part.read().tobytes() == value.tobytes()


@st.composite
def any_bits(draw: st.DrawFn, dtype: str, size: int) -> np.ndarray:
    width = NUMPY_DTYPES[dtype].itemsize
    return np.frombuffer(draw(st.binary(min_size=size * width, max_size=size * width)), NUMPY_DTYPES[dtype])


@settings(max_examples=200, deadline=None)
@given(data=st.data(), rows=st.integers(1, 5), columns=st.integers(1, 7))
def test_any_bits_at_all_come_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, rows: int, columns: int
) -> None:
    """NaN payloads, infinities, subnormals, zeros of both signs, gains that wipe everything out."""
    dtype = data.draw(st.sampled_from(FLOATS))
    weight = data.draw(any_bits(dtype, rows * columns)).reshape(rows, columns)
    gain = data.draw(any_bits(data.draw(st.sampled_from(FLOATS)), 1))
    _, parts = fold_and_back(tmp_path_factory.getbasetemp(), weight, gain)
    assert_restored(parts, weight, gain)


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from(FLOATS),
    gain=st.floats(-100, 100, width=16).filter(lambda g: abs(g) > 1e-2),
    seed=st.integers(0, 2**32 - 1),
)
@example(dtype="bfloat16", gain=1.0, seed=0)
@example(dtype="bfloat16", gain=-0.5, seed=0)
def test_ordinary_weights_need_small_corrections(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, gain: float, seed: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    weight = np.random.default_rng(seed).normal(size=(37, 11)).astype(NUMPY_DTYPES[dtype])
    factor = np.array([gain], NUMPY_DTYPES[dtype])
    whole, parts = fold_and_back(folder, weight, factor)
    # What the authors compute at run time: a product rounded once to the weight's dtype.
    wide = weight.astype(np.longdouble) * factor.astype(np.longdouble)
    assert np.array_equal(whole, wide.astype(np.float64).astype(whole.dtype))
    assert_restored(parts, weight, factor)
    if (folder / "lm_head_fold.npz").is_file():
        with np.load(folder / "lm_head_fold.npz", allow_pickle=False) as file:
            assert len(file["exceptions"]) == 0


def test_the_fold_is_torchs_product_in_the_weights_dtype(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    for dtype in ("bfloat16", "float16", "float32"):
        for gain_dtype in ("bfloat16", "float32"):
            weight = random.normal(size=(64, 64)).astype(np.float32).astype(NUMPY_DTYPES[dtype])
            gain = np.array([1.3371], np.float32).astype(NUMPY_DTYPES[gain_dtype])
            whole = fold.folded("w", from_array("a", weight), from_array("g", gain)).read()
            target = getattr(torch, dtype)
            expected = torch.tensor(weight.astype(np.float32)).to(target) * torch.tensor(gain.astype(np.float32)).to(
                getattr(torch, gain_dtype)
            ).to(target)
            assert np.array_equal(whole.astype(np.float32), expected.float().numpy())
            # The control: rounding the gain too late, or not at all, is another matrix.
            if dtype != "float32" and gain_dtype == "float32":
                late = (weight.astype(np.float32) * gain.astype(np.float32)).astype(weight.dtype)
                assert not np.array_equal(late, whole)


def test_without_the_sidecar_the_gain_is_one() -> None:
    folded = from_array("lm_head.weight", np.ones((2, 3), ml_dtypes.bfloat16))
    weight, gain = fold.unfolded(folded, ("lm_head", "w_g"), None)
    assert np.array_equal(weight.read(), folded.read())
    assert (gain.dtype, gain.read().tolist()) == ("bfloat16", [1.0])
    # And such a pair folds back without a sidecar.
    assert fold.sidecar_writer(weight, gain) is None


def test_blocks_of_any_size_give_the_same_sidecar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(101, 7)).astype(np.float16)
    weight[3, 3], weight[50, 0] = np.nan, np.inf
    gain = np.array([1.37], np.float16)
    contents = []
    for block_bytes in (14, 98, 10**9):
        monkeypatch.setattr(tensor_module, "BLOCK_BYTES", block_bytes)
        whole, parts = fold_and_back(tmp_path, weight, gain)
        assert_restored(parts, weight, gain)
        assert len(list(from_array("x", whole).blocks())) == {14: 101, 98: 15, 10**9: 1}[block_bytes]
        contents.append((tmp_path / "lm_head_fold.npz").read_bytes())
    assert contents[0] == contents[1] == contents[2]


def made(tmp_path: Path) -> tuple[Path, np.ndarray]:
    weight = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    whole, _ = fold_and_back(tmp_path, weight, np.array([1.37], np.float32))
    return tmp_path / "lm_head_fold.npz", whole


def unfold(path: Path, whole: np.ndarray) -> np.ndarray:
    return fold.unfolded(from_array("lm_head.weight", whole), ("lm_head", "w_g"), path.parent)[0].read()


def test_a_sidecar_of_other_weights_is_refused(tmp_path: Path) -> None:
    path, whole = made(tmp_path)
    unfold(path, whole)
    other = np.random.default_rng(1).normal(size=whole.shape).astype(np.float32)
    for weights, message in (
        (other, "does not fit"),
        (whole[:-1], "does not fit"),
        (np.concatenate([whole, whole]), "ends early|does not fit"),
        (whole.astype(np.float16), "float32"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            unfold(path, weights)
        assert "lm_head_fold.npz" in str(caught.value)


def test_a_damaged_sidecar_is_refused(tmp_path: Path) -> None:
    path, whole = made(tmp_path)
    good = path.read_bytes()
    for bad in (b"", b"PK", good[:50], good[: len(good) // 2], good[:-10], good.replace(b"codes", b"cades")):
        path.write_bytes(bad)
        with pytest.raises(InputError, match="damaged"):
            unfold(path, whole)
    for position in range(30, len(good), 7):
        changed = bytearray(good)
        changed[position] ^= 0xFF
        path.write_bytes(changed)
        try:
            assert np.array_equal(unfold(path, whole), unfold_good(path, good, whole))
        except InputError as error:
            assert "\n" not in str(error)


def unfold_good(path: Path, good: bytes, whole: np.ndarray) -> np.ndarray:
    path.write_bytes(good)
    return unfold(path, whole)


def test_a_sidecar_with_a_pickle_is_refused(tmp_path: Path) -> None:
    path, whole = made(tmp_path)
    np.savez(path, gain=np.array([{"a": 1}], dtype=object), gain_dtype="float32", weight_dtype="float32")
    with pytest.raises(InputError, match="damaged"):
        unfold(path, whole)
    for gain, dtype in ((np.ones(2, np.uint32), "float32"), (np.ones(1, np.uint16), "float32"), (np.ones(1), "x")):
        np.savez(path, gain=gain, gain_dtype=dtype, weight_dtype="float32", codes=np.zeros(1), exceptions=np.zeros(0))
        with pytest.raises(InputError, match="damaged"):
            unfold(path, whole)
