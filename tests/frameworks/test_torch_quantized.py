"""Folders that stock mlx-lm quantized, run by our kernels, against stock Transformers over the same weights."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import isomorph
from conftest import assert_logits_close
from frameworks.random_models import MODELS, VOCABULARY, random_folder, with_matrices
from isomorph import evaluate
from isomorph.errors import InputError
from isomorph.frameworks.torch_quantized import torch_view
from isomorph.pocket import heldout_text

transformers = pytest.importorskip("transformers")
pytest.importorskip("mlx_lm")


@dataclass(frozen=True)
class Case:
    """One folder: how stock mlx-lm quantizes a random model."""

    model_type: str
    bits: int = 4
    group_size: int = 32
    mode: str = "affine"
    recipe: str | None = None

    def __str__(self) -> str:
        return f"{self.model_type}-{self.recipe or self.mode}-{self.bits}-{self.group_size}"


QUICK = [
    Case("llama", 4, 64),
    Case("llama", recipe="mixed_3_6"),
    Case("qwen2", 6),
    Case("mixtral", 4, 32, "mxfp4"),
    Case("gemma3_text", 3, recipe="overrides"),
    Case("gpt2", 8),
    Case("granite", 8),
    Case("gpt_oss"),
]
FULL_SETTINGS = [
    (2, 32, "affine", None),
    (3, 64, "affine", None),
    (4, 64, "affine", "overrides"),
    (5, 32, "affine", None),
    (6, 64, "affine", None),
    (8, 32, "affine", None),
    (4, 32, "mxfp4", None),
    (8, 32, "mxfp8", None),
    (4, 16, "nvfp4", None),
]


def converted(cases: list[Case], folder: Path) -> dict[Case, Path]:
    """What stock mlx-lm makes of the cases: `source`, `quantized` and `quantized.safetensors` in a folder each."""
    folders = {case: folder / str(case) for case in cases}
    jobs = []
    for case, place in folders.items():
        source = random_folder(case.model_type, place / "source")
        jobs.append(asdict(case) | {"source": str(source), "target": str(place / "quantized")})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("mlx_convert.py")
    done = subprocess.run([sys.executable, script, folder / "jobs.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folders


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return converted(QUICK, tmp_path_factory.mktemp("quick"))


def reference_model(case: Case, folder: Path) -> torch.nn.Module:
    """Stock Transformers over the weights as mlx dequantizes them."""
    matrices = load_file(folder / "quantized.safetensors")
    if case.model_type != "gpt_oss":
        plain = with_matrices(folder / "source", matrices, folder / "plain")
        return transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    module = transformers.AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32).eval()
    others = load_file(folder / "quantized" / "model.safetensors")
    state = {}
    for name in module.state_dict():
        if "experts." not in name:
            path = name.removesuffix(".weight")
            state[name] = matrices[path] if path in matrices else others[name]
            continue
        # [E, N, K] of each, interleaved and transposed as Transformers has them.
        stem, _, leaf = name.rpartition(".")
        suffix, kept = (".bias", others) if leaf.endswith("_bias") else ("", matrices)
        parts = ("gate_proj", "up_proj") if leaf.startswith("gate_up") else ("down_proj",)
        stacked = np.stack([kept[f"{stem}.{part}{suffix}"] for part in parts], 2)
        joined = stacked.reshape(stacked.shape[0], -1, *stacked.shape[3:])
        state[name] = joined if suffix else joined.transpose(0, 2, 1)
    module.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})
    return module


def check(case: Case, folder: Path) -> None:
    model = isomorph.load(folder / "quantized", framework="torch", dtype="float32")
    kinds = {type(part).__name__ for part in model.module.modules()}
    assert "QuantizedLinear" in kinds
    assert ("QuantizedExperts" in kinds) == ("moe" in case.model_type or case.model_type in ("mixtral", "gpt_oss"))
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (2, 24))
    with torch.inference_mode():
        reference = reference_model(case, folder)(torch.from_numpy(ids)).logits.numpy()
    assert_logits_close(model.logits(ids), reference)
    check_decoding(model, ids, reference)
    packed = next(part for part in model.module.modules() if hasattr(part, "scales"))
    packed.scales = packed.scales + 1 if packed.scales.dtype == torch.uint8 else packed.scales * 1.01
    with pytest.raises(AssertionError):
        assert_logits_close(model.logits(ids), reference)


def check_decoding(model, ids: np.ndarray, reference: np.ndarray) -> None:
    """Token by token, recorded steps or not, gives the logits of the whole."""
    state = model.decode_state(len(ids))
    state.feed(ids[:, :9])
    for place in range(9, ids.shape[1]):
        logits = state.feed(ids[:, place : place + 1])
        assert_logits_close(logits[:, 0], reference[:, place])
    assert model.steps.recorded(len(ids)), "no step was recorded"


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_runs_what_mlx_quantized(case, quick):
    check(case, quick[case])


@pytest.mark.full
@pytest.mark.parametrize("model_type", MODELS)
def test_runs_what_mlx_quantized_at_any_width(model_type, tmp_path):
    cases = [Case(model_type, *settings) for settings in FULL_SETTINGS]
    for case, folder in converted(cases, tmp_path).items():
        check(case, folder)


@pytest.mark.full
def test_what_granite_misses_of_the_rule_is_float32s_own_rounding(tmp_path):
    """With its default multipliers (attention unscaled) float32 itself is about as far from float64 as the rule allows.

    Stock Transformers over the dequantized weights and our products err alike, so the cases above have multipliers of
    published models.
    """
    source = random_folder("granite", tmp_path / "source", **dict.fromkeys(MODELS["granite"], 1.0))
    case = Case("granite", 8)
    job = asdict(case) | {"source": str(source), "target": str(tmp_path / "quantized")}
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    script = Path(__file__).with_name("mlx_convert.py")
    subprocess.run([sys.executable, script, tmp_path / "jobs.json"], capture_output=True, check=True)
    reference = reference_model(case, tmp_path)
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (8, 24))
    with torch.inference_mode():
        single = reference(torch.from_numpy(ids)).logits.double().numpy()
        exact = reference.double()(torch.from_numpy(ids)).logits.numpy()
    ours = isomorph.load(tmp_path / "quantized", dtype="float32").logits(ids).astype(np.float64)
    noise, error = (np.sqrt(np.mean((logits - exact) ** 2)) for logits in (single, ours))
    assert np.abs(single - exact).max() > 0.5 * 2e-5
    assert error <= 2 * noise


def rewritten(folder: Path, target: Path, change) -> Path:
    """A copy of a quantized folder after `change(tensors, config)`."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "mlx"})
    (target / "config.json").write_text(json.dumps(config))
    return target


Q = "model.layers.1.self_attn.q_proj"


def cut(name, rows=None, columns=None):
    def change(tensors, config):
        tensors[name] = np.ascontiguousarray(tensors[name][:rows, :columns])

    return change


def set_first(name, value):
    def change(tensors, config):
        tensors[name] = tensors[name].copy()
        tensors[name].flat[0] = value

    return change


def configured(**values):
    def change(tensors, config):
        for key in ("quantization", "quantization_config"):
            config[key] |= values

    return change


def transposed_pair(tensors, config):
    for part in ("weight", "scales", "biases"):
        tensors[f"{Q}.{part}"] = np.ascontiguousarray(tensors[f"{Q}.{part}"][:32])


def without(name):
    return lambda tensors, config: tensors.pop(name)


def renamed(tensors, config):
    tensors["model.final.weight"] = tensors.pop("model.norm.weight")


MALFORMED = {
    "missing scales": (without(f"{Q}.scales"), f"{Q}.scales"),
    "missing biases": (without(f"{Q}.biases"), f"{Q}.biases"),
    "missing words": (without(f"{Q}.weight"), f"{Q}.weight"),
    "missing parameter": (without("model.norm.weight"), "model.norm.weight"),
    "unknown parameter": (renamed, "missing"),
    "fewer rows of words": (cut(f"{Q}.weight", rows=32), "same rows"),
    "fewer rows": (transposed_pair, "shape"),
    "fewer groups": (cut(f"{Q}.scales", columns=1), Q),
    "other biases": (cut(f"{Q}.biases", rows=3), f"{Q}.biases"),
    "other bits": (configured(bits=8), "8 bits"),
    "impossible bits": (configured(bits=7), "bits"),
    "impossible group size": (configured(group_size=48), "group"),
    "a group size that does not divide": (configured(group_size=128), "128"),
    "NaN scales": (set_first(f"{Q}.scales", np.nan), "finite scales"),
    "infinite biases": (set_first(f"{Q}.biases", np.inf), "finite biases"),
    "a module of its own bits": (configured(**{Q: {"bits": 3, "group_size": 32}}), "3 bits"),
    "bits that only fit the words": (configured(**{Q: {"bits": 3, "group_size": 64}}), "of shape [64, 64]"),
    "a plain module": (configured(**{"model.norm": {"bits": 4, "group_size": 32}}), "model.norm"),
    "no settings": (lambda tensors, config: [config.pop(k) for k in ("quantization", "quantization_config")], "quant"),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_folders_get_one_line(fault, quick, tmp_path):
    change, told = MALFORMED[fault]
    folder = rewritten(quick[QUICK[2]] / "quantized", tmp_path / "folder", change)
    with pytest.raises(InputError) as error:
        isomorph.load(folder, framework="torch", dtype="float32")
    text = str(error.value)
    assert told in text
    assert "expected" in text and "found" in text and "\n" not in text


@pytest.mark.parametrize("fault", ["other bits", "impossible group size", "fewer groups", "missing biases"])
def test_malformed_folders_do_not_reach_mlx(fault, quick, tmp_path):
    """It divides by zero, or reads them as something else."""
    change, told = MALFORMED[fault]
    folder = rewritten(quick[QUICK[2]] / "quantized", tmp_path / "folder", change)
    with pytest.raises(InputError, match=f"expected .*{told}.*; found"):
        isomorph.load(folder, framework="mlx")


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_either_key_and_shards_will_do(key, quick, tmp_path):
    source = quick[QUICK[0]] / "quantized"
    folder = rewritten(source, tmp_path / "folder", lambda tensors, config: config.pop(key))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[part::2]) for part in (0, 1)]
    index = {}
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(half, folder / file, metadata={"format": "mlx"})
        index |= dict.fromkeys(half, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    ids = np.arange(3, 20)[None]
    expected = isomorph.load(source, dtype="float32").logits(ids)
    assert np.array_equal(isomorph.load(folder, dtype="float32").logits(ids), expected)


def test_fast_is_another_result_and_other_numerics_are_refused(quick):
    folder = quick[QUICK[0]] / "quantized"
    ids = np.arange(3, 20)[None]
    exact, fast = (isomorph.load(folder, dtype="float32", numerics=name).logits(ids) for name in ("exact", "fast"))
    assert 0 < np.abs(exact - fast).max() < 0.3
    with pytest.raises(InputError, match="exact or fast; found 'quick'"):
        isomorph.load(folder, numerics="quick")


def test_views_do_not_copy():
    array = np.arange(6, dtype=np.uint32)
    assert torch_view(array).data_ptr() == array.ctypes.data
    assert torch_view(np.array(3.0)).shape == ()


def test_convolutions_lie_the_other_way_round(tmp_path):
    """lfm2's, as stock mlx-lm writes them; they remember what is no key and no value."""
    layers = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    source = random_folder("lfm2", tmp_path / "source", **layers)
    isomorph.quantize(source, tmp_path / "own", bits=4, group_size=32)
    name, ids = "model.layers.0.conv.conv.weight", np.arange(3, 20)[None]

    def turned(tensors, config):
        tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))

    def wrong(tensors, config):
        tensors[name] = np.ascontiguousarray(tensors[name][:, :, ::-1].swapaxes(1, 2))

    expected = isomorph.load(tmp_path / "own", dtype="float32").logits(ids)
    for change, same in ((turned, True), (wrong, False)):
        folder = rewritten(tmp_path / "own", tmp_path / change.__name__, change)
        model = isomorph.load(folder, dtype="float32")
        assert np.array_equal(model.logits(ids), expected) == same
    with pytest.raises(InputError, match="found lfm2, some of whose keep another state; use framework mlx"):
        model.generate(ids[0], max_tokens=2)
    isomorph.convert(tmp_path / "own", tmp_path / "floats", to="transformers", dequantize=True)
    with pytest.raises(InputError, match=r"of shape \[64, 3, 1\], not \[64, 1, 3\]"):
        isomorph.convert(tmp_path / "turned", tmp_path / "no", to="transformers", dequantize=True)


def test_numbers_that_mlx_lm_changes_are_refused(quick, tmp_path):
    change = lambda tensors, config: config.update(model_type="qwen3_next")
    folder = rewritten(quick[QUICK[0]] / "quantized", tmp_path / "folder", change)
    with pytest.raises(InputError, match="found 'qwen3_next', whose mlx-lm changes"):
        isomorph.load(folder, framework="torch")


def test_fast_adds_no_divergence_that_counts(tmp_path):
    """On the pocket model in 4 bits, over held-out text; what 4 bits themselves cost is the control."""
    isomorph.quantize("pocket:talkie", tmp_path / "four", bits=4)
    reference = isomorph.load("pocket:talkie", dtype="float32")

    def divergence(numerics: str) -> float:
        model = isomorph.load(tmp_path / "four", dtype="float32", numerics=numerics)
        record = evaluate.divergence(reference, model, heldout_text(), window=256, stride=256, limit=1024)
        return record.results["kl_nats_per_token"]

    exact, fast = divergence("exact"), divergence("fast")
    assert exact != fast
    assert abs(fast - exact) <= 1e-3 < exact
