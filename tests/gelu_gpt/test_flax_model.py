"""GELU-GPT's Flax model beyond its numbers: the decode state across its windows, loss, gradients, several devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

import isomorph
from conftest import assert_logits_close
from isomorph import InputError
from isomorph.architectures.gelu_gpt import modeling_flax
from isomorph.architectures.gelu_gpt.config import GeluGPTConfig
from isomorph.architectures.gelu_gpt.modeling_flax import Cache, Model
from isomorph.architectures.gelu_gpt.weights import parameters
from isomorph.frameworks.flax import FED, FlaxModel, bucket
from isomorph.frameworks.nnx_parameters import merge, split
from tiny_gelu_gpt import write_checkpoint

#: Minutes of compiling on two cores.
full = pytest.mark.full

#: Longer than the short window (128 tokens) and than its ring; left padding of each row of the padded tests.
LENGTH, PADDING = 300, (0, 3, 140)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", seed=4)


@pytest.fixture(scope="module")
def model(folder: Path) -> FlaxModel:
    loaded = isomorph.load(folder, framework="flax")
    assert isinstance(loaded, FlaxModel)
    return loaded


@pytest.fixture(scope="module")
def ids(model: FlaxModel) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.vocab_size, (3, LENGTH))


@pytest.fixture(scope="module")
def padded(ids: np.ndarray) -> np.ndarray:
    return np.stack([np.append(np.zeros(count, int), row[: LENGTH - count]) for row, count in zip(ids, PADDING)])


@pytest.fixture(scope="module")
def expected(model: FlaxModel, ids: np.ndarray) -> np.ndarray:
    """Full forward logits [3, LENGTH, V]."""
    return model.logits(ids)


@full
def test_plain_call_equals_the_masked_pass(
    model: FlaxModel, ids: np.ndarray, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What training calls, `model(ids)`, and what the framework calls are one function, however queries are cut."""
    monkeypatch.setattr(modeling_flax, "QUERY_BLOCK", 96)
    plain = jax.jit(lambda parameters, rows: merge(model.graph, parameters)(rows))
    assert_logits_close(np.asarray(plain(model.parameters, jnp.asarray(ids))), expected)


@full
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_at_either_side_changes_nothing(
    model: FlaxModel, padded: np.ndarray, expected: np.ndarray, side: str
) -> None:
    mask = np.arange(LENGTH) >= np.array(PADDING)[:, None]
    rows = padded
    if side == "right":
        mask, rows = mask[:, ::-1], np.stack([np.roll(row, -count) for row, count in zip(padded, PADDING)])
    logits = model.logits(rows, mask)
    for row, count in enumerate(PADDING):
        assert_logits_close(logits[row, mask[row]], expected[row, : LENGTH - count])
    if side == "left":
        with pytest.raises(AssertionError):
            assert_logits_close(model.logits(rows)[1, 3:], expected[1, :-3])


@full
def test_decoding_across_the_window(model: FlaxModel, padded: np.ndarray, expected: np.ndarray) -> None:
    state = model.decode_state(3, left_padding=PADDING)
    ends = (150, 151, 152, 290, LENGTH)
    logits = np.concatenate([state.feed(padded[:, start:end]) for start, end in zip((0, *ends), ends)], axis=1)
    for row, count in enumerate(PADDING):
        assert_logits_close(logits[row, count:], expected[row, : LENGTH - count])
    assert state.lengths.tolist() == [LENGTH - count for count in PADDING]


def test_first_decoded_token_is_smeared(
    model: FlaxModel, ids: np.ndarray, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = model.decode_state(3)
    state.feed(ids[:, :20])
    assert_logits_close(state.feed(ids[:, 20:21]), expected[:, 20:21])
    state.trim(1)
    state.cache = state.cache._replace(embedded=jnp.zeros_like(state.cache.embedded))
    with pytest.raises(AssertionError):
        assert_logits_close(state.feed(ids[:, 20:21]), expected[:, 20:21])


@full
@pytest.mark.parametrize("trims", [[100], [60, 60, 60]], ids=["within a ring", "past a ring"])
def test_trim_after_the_rings_have_wrapped(
    model: FlaxModel, ids: np.ndarray, expected: np.ndarray, trims: list[int]
) -> None:
    state = model.decode_state(3)
    state.feed(ids, last_only=True)
    for tokens in trims:
        state.trim(tokens)
    left = LENGTH - sum(trims)
    assert_logits_close(state.feed(ids[:, left : left + 9]), expected[:, left : left + 9][:, : LENGTH - left])


@full
def test_a_ring_trimmed_past_its_slack_without_reading_again_is_caught(
    model: FlaxModel, ids: np.ndarray, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = model.decode_state(3)
    state.feed(ids, last_only=True)
    monkeypatch.setattr(type(state), "_read_again", lambda _: None)
    state.trim(180)
    with pytest.raises(AssertionError):
        assert_logits_close(state.feed(ids[:, 120:129]), expected[:, 120:129])


@full
def test_rows_filter_join_and_return_from_a_file(
    model: FlaxModel, ids: np.ndarray, padded: np.ndarray, tmp_path: Path
) -> None:
    state, other = model.decode_state(3, left_padding=PADDING), model.decode_state(1)
    state.feed(padded, last_only=True)
    other.feed(ids[1:2, :40], last_only=True)
    state.reorder([2, 0])
    state.extend(other)
    state.save(tmp_path / "state")
    loaded = model.load_decode_state(tmp_path / "state")
    sequences = [ids[2, : LENGTH - 140], ids[0], ids[1, :40]]
    new = ids[:, :5]
    logits = loaded.feed(new)
    np.testing.assert_array_equal(logits, state.feed(new))
    for row, sequence in enumerate(sequences):
        assert_logits_close(logits[row], model.logits(np.append(sequence, new[row])[None])[0, -5:])


@full
def test_sliding_layers_keep_their_window(model: FlaxModel, ids: np.ndarray) -> None:
    """Three windows of tokens later, only the layer that looks back over the sequence has grown."""
    state = model.decode_state(3)
    state.feed(ids, last_only=True)
    for _ in range(2):
        state.feed(ids, last_only=True)
    config: GeluGPTConfig = model.config
    assert isinstance(state.cache, Cache)
    assert state.cache.embedded.shape[1] == 1 + FED
    assert [keys.shape[1] for keys, _ in state.cache.layers] == [window + FED for window in config.windows]
    assert config.windows == (128, 128, 256)
    last = model.logits(np.concatenate([ids] * 3, axis=1))[:, -1:]
    state.trim(1)
    assert_logits_close(state.feed(ids[:, -1:]), last)


@full
def test_few_programs_are_compiled(folder: Path) -> None:
    model = isomorph.load(folder, framework="flax")
    state = model.decode_state(1, max_length=512)
    lengths = (1, 2, 7, 16, 100, 128, 129, 3)
    for length in lengths:
        state.feed(np.zeros((1, length), int), last_only=True)
    assert model.step._cache_size() == len({bucket(min(length, FED)) for length in lengths}) == 3


@full
def test_positions_past_the_table_are_nan(model: FlaxModel) -> None:
    """The wrapper refuses them; whoever calls the module itself gets no plausible number."""
    trunk = jax.jit(lambda lengths: merge(model.graph, model.parameters).trunk(jnp.zeros((1, 2), int), lengths=lengths))
    x, _, _ = trunk(jnp.array([2559]))
    assert np.isnan(x[0, 1]).all()


@full
def test_loss_is_that_of_the_logits(model: FlaxModel, ids: np.ndarray) -> None:
    """In parts of a row, with targets that do not count, and with the gradient of the plain formula."""
    ids = ids[:2, :150]
    targets = np.where(np.arange(150) % 7 == 3, -1, np.roll(ids, -1, axis=1))

    def plain(parameters: Any) -> jax.Array:
        log_probabilities = jax.nn.log_softmax(merge(model.graph, parameters)(jnp.asarray(ids)))
        chosen = jnp.take_along_axis(log_probabilities, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(targets >= 0, chosen, 0)) / np.sum(targets >= 0)

    def own(parameters: Any) -> jax.Array:
        return merge(model.graph, parameters).loss(jnp.asarray(ids), jnp.asarray(targets))

    loss, gradients = jax.jit(jax.value_and_grad(own))(model.parameters)
    reference, reference_gradients = jax.jit(jax.value_and_grad(plain))(model.parameters)
    assert abs(float(loss) - float(reference)) <= 2e-6
    assert abs(float(jax.jit(own)(model.parameters)) - float(reference)) <= 2e-6
    for name, gradient in gradients.items():
        scale = float(jnp.abs(reference_gradients[name]).max())
        np.testing.assert_allclose(gradient, reference_gradients[name], rtol=0, atol=1e-4 * scale, err_msg=name)
    with pytest.raises(AssertionError):  # a control: the padded rows of the vocabulary count for nothing
        wrong = modeling_flax.cross_entropy(jnp.ones((1, 1, 48)), jnp.zeros((128, 48)), jnp.zeros((1, 1), int), 128)
        np.testing.assert_allclose(float(wrong), np.log(120), rtol=1e-3)


@full
def test_remat_gives_the_same_gradients(model: FlaxModel, ids: np.ndarray) -> None:
    remat, _ = split(Model(model.config, remat=True, rngs=nnx.Rngs(0)))
    inputs, targets = jnp.asarray(ids[:2, :140]), jnp.asarray(ids[:2, 1:141])

    def lowered(graph: nnx.GraphDef) -> Any:
        return jax.jit(jax.grad(lambda parameters: merge(graph, parameters).loss(inputs, targets))).lower(
            model.parameters
        )

    plain, again = lowered(model.graph), lowered(remat)
    expected, gradients = (program.compile()(model.parameters) for program in (plain, again))
    for name, gradient in expected.items():
        np.testing.assert_allclose(gradients[name], gradient, atol=1e-5, err_msg=name)
    # A control: the option does something.
    assert again.as_text().count("optimization_barrier") > plain.as_text().count("optimization_barrier")


def test_fresh_parameters_are_those_of_the_config() -> None:
    config = GeluGPTConfig.from_dict({"n_layer": 5, "n_embd": 48, "n_head": 4, "n_kv_head": 2, "vocab_size": 100})
    _, values = split(Model(config, rngs=nnx.Rngs(0)))
    assert sum(value.size for value in values.values()) == sum(int(np.prod(s)) for s in parameters(config).values())
    assert values["wte.embedding"].shape == (128, 48)
    assert [name for name in values if name.startswith("value_embeds")] == [
        f"value_embeds.{layer}.embedding" for layer in (0, 2, 4)
    ]
    np.testing.assert_allclose(values["resid_lambdas"], np.linspace(1.15, 1.05, 5), rtol=1e-6)
    np.testing.assert_allclose(values["x0_lambdas"], np.linspace(0.2, 0.05, 5), rtol=1e-6)
    assert not values["blocks.0.mlp.c_proj.kernel"].any()


def test_published_model_counts_its_parameters() -> None:
    abstract = nnx.eval_shape(lambda: Model(GeluGPTConfig(), rngs=nnx.Rngs(0)))
    assert sum(value.size for value in split(abstract)[1].values()) == 261_096_338


def test_a_mesh_of_other_axes_is_refused(model: FlaxModel) -> None:
    with pytest.raises(InputError, match="data, fsdp, model; found tensor"):
        model.shard(Mesh(np.array(jax.devices()[:1]), ("tensor",)))
    with pytest.raises(InputError, match="found expert"):
        model.shard(Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("model", "expert")))


EIGHT_DEVICES = """
import sys
import jax
import numpy as np
from jax.sharding import Mesh
import isomorph


folder, out = sys.argv[1:]
model = isomorph.load(folder, framework="flax")
ids = np.load(f"{out}/ids.npy")
assert len(jax.devices()) == 8
model.shard(Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "model")))
placed = model.parameters["blocks.0.attn.c_q.kernel"]
assert placed.sharding.shard_shape(placed.shape) == (24, 24), placed.sharding
state = model.decode_state(2)
steps = [state.feed(ids[:, :128]), *(state.feed(ids[:, at : at + 1]) for at in range(128, ids.shape[1]))]
np.savez(f"{out}/sharded.npz", full=model.logits(ids), steps=np.concatenate(steps, axis=1))
"""


@full
def test_eight_devices_equal_one(
    model: FlaxModel, folder: Path, ids: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", ids[:2, :134])
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", EIGHT_DEVICES, str(folder), str(tmp_path)]
    subprocess.run(command, env={**os.environ, **flags}, check=True, timeout=300)
    sharded = np.load(tmp_path / "sharded.npz")
    assert_logits_close(sharded["full"], expected[:2, :134])
    assert_logits_close(sharded["steps"], expected[:2, :134])
    with pytest.raises(AssertionError):
        assert_logits_close(sharded["full"][::-1], expected[:2, :134])
