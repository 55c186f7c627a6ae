"""The training loop: it learns, and it resumes to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from isomorph.architectures.talkie.config import TalkieConfig
from isomorph.architectures.talkie.modeling_flax import Model
from isomorph.errors import InputError
from isomorph.frameworks.nnx_parameters import split
from isomorph.train.data import windows
from isomorph.train.flops import measured_peak_flops, model_flops_per_token
from isomorph.train.metrics import read_metrics
from isomorph.train.optimizer import adamw, warmup_cosine
from isomorph.train.settings import Settings
from isomorph.train.trainer import initial_state, make_step, train

from .conftest import SHAPE

make_model = partial(Model, TalkieConfig(**SHAPE))
TOKENS = np.tile(np.arange(40, dtype=np.uint16), 60)
SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "sequence_length": 16,
    "learning_rate": 1e-2,
    "warmup_steps": 5,
    "log_every": 1,
    "checkpoint_every": 10,
}


def batches(settings: Settings) -> Any:
    return windows(TOKENS, settings.batch_size, settings.sequence_length, settings.seed)


def losses(out: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(out / "metrics.jsonl")}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps without a stop."""
    out = tmp_path_factory.mktemp("straight")
    settings = Settings(steps=30, **SETTINGS)
    train(make_model, batches(settings), settings, out)
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_falls(straight: Path, tmp_path: Path, dtype: str) -> None:
    if dtype == "bfloat16":
        settings = Settings(steps=30, dtype=dtype, **SETTINGS)
        parameters = train(make_model, batches(settings), settings, tmp_path)
        assert all(value.dtype == jnp.float32 for value in parameters.values())
        found = losses(tmp_path)
        # Eight bits of mantissa: near the float32 run, and not the same.
        assert 0 < abs(found[1] - losses(straight)[1]) < 0.05
    else:
        found = losses(straight)
    assert sorted(found) == list(range(1, 31))
    assert found[1] == pytest.approx(np.log(SHAPE["vocab_size"]), abs=0.3)
    assert found[30] < 0.6 * found[1]


def test_every_parameter_is_trained(straight: Path, tmp_path: Path) -> None:
    settings = Settings(steps=30, **SETTINGS)
    parameters = train(make_model, batches(settings), settings, straight)
    _, initial = split(make_model(rngs=nnx.Rngs(settings.seed)))
    for name, value in parameters.items():
        assert not np.array_equal(value, initial[name]), name


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from train.test_trainer import SETTINGS, batches, make_model
from isomorph.train.settings import Settings
from isomorph.train.trainer import train

settings = Settings(steps=30, **SETTINGS)
order = batches(settings)

def deadly(step):
    if step == 23:
        os.kill(os.getpid(), signal.SIGKILL)
    return order(step)

train(make_model, deadly, settings, Path(sys.argv[2]))
"""


def test_a_killed_run_resumes_exactly(straight: Path, tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", KILLED, str(tests), str(tmp_path)]
    killed = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert max(losses(tmp_path)) == 23
    # What a kill leaves of a line that was being written.
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"stage": "tr')
    settings = Settings(steps=30, **SETTINGS)
    asked: list[int] = []

    def watched(step: int) -> Any:
        asked.append(step)
        return batches(settings)(step)

    train(make_model, watched, settings, tmp_path)
    assert asked == list(range(20, 30))
    assert losses(tmp_path) == losses(straight)
    keys = ("smoothed_loss", "gradient_norm", "learning_rate", "tokens")
    ends = [read_metrics(out / "metrics.jsonl")[-1] for out in (tmp_path, straight)]
    assert [ends[0][key] for key in keys] == [ends[1][key] for key in keys]


def test_control_c_ends_the_step_and_resumes_exactly(straight: Path, tmp_path: Path) -> None:
    settings = Settings(steps=30, **SETTINGS)

    def interrupted(step: int) -> Any:
        if step == 23:
            os.kill(os.getpid(), signal.SIGINT)
        return batches(settings)(step)

    with pytest.raises(KeyboardInterrupt):
        train(make_model, interrupted, settings, tmp_path)
    assert max(losses(tmp_path)) == 24
    asked: list[int] = []

    def watched(step: int) -> Any:
        asked.append(step)
        return batches(settings)(step)

    train(make_model, watched, settings, tmp_path)
    assert asked == list(range(24, 30))
    assert losses(tmp_path) == losses(straight)


def test_flops_are_those_of_the_matrices() -> None:
    """Talkie's: seven matrices a layer and the head, and two products of attention over all positions."""
    graph, parameters = split(make_model(rngs=nnx.Rngs(0)))
    length = 16
    matrices = sum(value.size for name, value in parameters.items() if value.ndim == 2 and "embed" not in name)
    attention = SHAPE["num_hidden_layers"] * 2 * length * SHAPE["num_attention_heads"] * SHAPE["head_dim"]
    found = model_flops_per_token(graph, parameters, Settings(steps=1, sequence_length=length))
    assert found == 3 * 2 * (matrices + attention)
    assert measured_peak_flops("float32", size=256) > 1e8


def test_another_order_of_the_data_would_show(straight: Path, tmp_path: Path) -> None:
    """The control of the test above: losses do depend on what each step reads."""
    settings = Settings(steps=3, **{**SETTINGS, "batch_size": 4})
    other = windows(TOKENS[::-1].copy(), 4, 16, settings.seed)
    train(make_model, other, settings, tmp_path)
    assert losses(tmp_path)[2] != losses(straight)[2]


def test_accumulation_gives_the_same_step() -> None:
    """Parts of a batch, of which not all targets count, add up to the whole."""
    graph, parameters = split(make_model(rngs=nnx.Rngs(0)))
    optimizer = adamw(lambda step: 1e-2, 0.9, 0.95, 0.0, 1.0)
    generator = np.random.default_rng(0)
    ids = generator.integers(0, SHAPE["vocab_size"], (4, 17), dtype=np.int32)
    counted = generator.integers(0, 2, (4, 16)).astype(bool)
    results = []
    for parts in (1, 4):
        fresh = jax.tree.map(jnp.copy, parameters)
        results.append(make_step(graph, optimizer, parts)(initial_state(fresh, optimizer), ids, counted))
    (_, loss, norm), (_, loss_in_parts, norm_in_parts) = results
    assert float(loss_in_parts) == pytest.approx(float(loss), rel=1e-6)
    assert float(norm_in_parts) == pytest.approx(float(norm), rel=1e-5)


def test_schedule() -> None:
    schedule = warmup_cosine(peak=2.0, steps=110, warmup_steps=10, final_fraction=0.1)
    assert [float(schedule(step)) for step in (0, 5, 10, 60, 110)] == pytest.approx([0.0, 1.0, 2.0, 1.1, 0.2])


def test_only_matrices_decay() -> None:
    parameters = {"matrix": jnp.ones((2, 2)), "gain": jnp.ones((1,))}
    optimizer = adamw(lambda step: 0.1, 0.9, 0.95, weight_decay=0.5, clip=1.0)
    still = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = optimizer.update(still, optimizer.init(parameters), parameters)
    decayed = optax.apply_updates(parameters, updates)
    np.testing.assert_allclose(decayed["matrix"], 0.95)
    np.testing.assert_allclose(decayed["gain"], 1.0)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    settings = Settings(steps=2, **SETTINGS)
    _, parameters = split(make_model(rngs=nnx.Rngs(0)))
    start = {name: np.full(value.shape, np.nan) for name, value in parameters.items()}
    with pytest.raises(InputError, match="finite loss"):
        train(make_model, batches(settings), settings, tmp_path, start=start)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 1, "accumulate": 3}, {"steps": 1, "dtype": "float8"}])
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Settings(**wrong)


EIGHT_DEVICES = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import jax, numpy as np
from jax.sharding import Mesh
from train.test_trainer import SETTINGS, batches, make_model
from isomorph.train.settings import Settings
from isomorph.train.trainer import train

assert len(jax.devices()) == 8
settings = Settings(steps=30, **SETTINGS)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "model"))
parameters = train(make_model, batches(settings), settings, Path(sys.argv[2]), mesh=mesh)
kernel = parameters["model.blocks.0.mlp.mlp_gate.kernel"]
assert kernel.sharding.shard_shape(kernel.shape) == (32, 32), kernel.sharding
"""


@pytest.mark.full
def test_eight_devices_train_like_one(straight: Path, tmp_path: Path) -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    tests = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", EIGHT_DEVICES, str(tests), str(tmp_path)]
    subprocess.run(command, env={**os.environ, **flags}, check=True, timeout=300)
    alone, sharded = losses(straight), losses(tmp_path)
    # Sums in another order differ by float32 rounding, which training carries along slowly.
    assert [sharded[step] for step in range(1, 6)] == pytest.approx([alone[step] for step in range(1, 6)], rel=1e-4)
    assert sharded[30] == pytest.approx(alone[30], rel=0.05)
