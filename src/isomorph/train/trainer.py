"""The training loop: one jitted step, checkpoints it resumes from exactly, metrics as JSON lines."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isomorph.errors import InputError
from isomorph.frameworks.nnx_parameters import merge, partition_specs, split
from isomorph.kernels import dense
from isomorph.progress import progress
from isomorph.train.checkpoints import open_checkpoints
from isomorph.train.data import Batch, Batches
from isomorph.train.flops import measured_peak_flops, model_flops_per_token
from isomorph.train.loss import summed_loss
from isomorph.train.metrics import MetricsLog
from isomorph.train.optimizer import adamw, warmup_cosine
from isomorph.train.rounding import straight_through
from isomorph.train.settings import Settings

#: What a run holds between steps: parameters, optimizer, step (int32) and smoothed_loss (float32).
State = dict[str, Any]
Parameters = dict[str, jax.Array]

SMOOTHING = 0.98


def make_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    accumulate: int,
    seen: Callable[[Parameters], Parameters] = dict,
) -> Callable[..., Any]:
    """The jitted step: (state, ids [B, T + 1], counted [B, T]) -> (state, loss, gradient norm). Donates the state.

    `seen` turns the parameters into those that the model computes with.
    """

    def loss_of(parameters: Parameters, ids: jax.Array, counted: jax.Array) -> jax.Array:
        return summed_loss(merge(graph, seen(parameters)), ids, counted)

    def step(state: State, ids: jax.Array, counted: jax.Array) -> tuple[State, jax.Array, jax.Array]:
        parts = (ids.reshape(accumulate, -1, ids.shape[1]), counted.reshape(accumulate, -1, counted.shape[1]))

        def add(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of)(state["parameters"], *part)), None

        nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state["parameters"]))
        (loss, gradients), _ = jax.lax.scan(add, nothing, parts) if accumulate > 1 else add(nothing, (ids, counted))
        # One mean over all targets of the step, however it was cut into parts.
        count = jnp.maximum(jnp.sum(counted), 1)
        loss, gradients = loss / count, jax.tree.map(lambda gradient: gradient / count, gradients)
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["parameters"])
        smoothed = jnp.where(state["step"] == 0, loss, SMOOTHING * state["smoothed_loss"] + (1 - SMOOTHING) * loss)
        state = {
            "parameters": optax.apply_updates(state["parameters"], updates),
            "optimizer": optimizer_state,
            "step": state["step"] + 1,
            "smoothed_loss": smoothed,
        }
        return state, loss, optax.tree.norm(gradients)

    return jax.jit(step, donate_argnums=0)


def train(
    make_model: Callable[..., nnx.Module],
    batches: Batches,
    settings: Settings,
    out: Path,
    *,
    start: Mapping[str, np.ndarray] | None = None,
    evaluate: Callable[[nnx.GraphDef, Parameters], dict[str, float]] | None = None,
    mesh: Mesh | None = None,
    stage: str = "train",
) -> Parameters:
    """Train until `settings.steps` and return the parameters (float32), rounded where the settings say so.

    `make_model(dtype=, rngs=)` builds the model; `start` replaces its random parameters. `out` gets `checkpoints/` and
    `metrics.jsonl`; when it holds a checkpoint, training goes on from there, step for step as if it had never stopped.
    `evaluate(graph, parameters)` gives numbers for the log. With a `mesh` of axes ("data", "fsdp", "model") the
    batch is split over the first two and the matrices over the last two; each process gives its share of the rows.
    """
    native = native_operations(make_model) if mesh is None and settings.dtype == "float32" else {}
    model: Any = make_model(dtype=jnp.dtype(settings.dtype), rngs=nnx.Rngs(settings.seed), **native)
    graph, parameters = split(model)
    # The same in operations of JAX's own, which can be counted.
    plain, _ = split(nnx.eval_shape(lambda: make_model(dtype=jnp.dtype(settings.dtype), rngs=nnx.Rngs(0))))
    if start is not None:
        parameters = {name: jnp.asarray(start[name], value.dtype) for name, value in parameters.items()}
    schedule = warmup_cosine(
        settings.learning_rate, settings.steps, settings.warmup_steps, settings.final_learning_rate_fraction
    )
    optimizer = adamw(schedule, settings.beta1, settings.beta2, settings.weight_decay, settings.clip)
    state = initial_state(parameters, optimizer, None if mesh is None else placed(model, mesh))
    seen = straight_through(settings.mxfp4)
    step_once = make_step(graph, optimizer, settings.accumulate, seen)
    with open_checkpoints(out / "checkpoints", model.config.to_dict()) as checkpoints:
        state = checkpoints.latest(state)
        first = int(state["step"])
        speed = Speed(first, settings, model_flops_per_token(plain, state["parameters"], settings))
        with (
            MetricsLog(out / "metrics.jsonl", stage, first) as log,
            progress(stage, settings.steps, "steps") as advance,
            patience() as interrupted,
        ):
            advance(first)
            for done in range(first + 1, settings.steps + 1):
                batch = batches(done - 1)
                state, loss, gradient_norm = step_once(state, *on_devices(batch, mesh))
                advance(1)
                if _due(done, settings.log_every, settings):
                    smoothed = _finite(float(state["smoothed_loss"]), done)
                    measured = {"loss": float(loss), "smoothed_loss": smoothed, "gradient_norm": float(gradient_norm)}
                    log.write(done, {**measured, "learning_rate": float(schedule(done - 1)), **speed.measure(done)})
                    advance(0, f"{stage}  loss {smoothed:.3f}")
                if evaluate is not None and _due(done, settings.evaluate_every, settings):
                    log.write(done, evaluate(graph, seen(state["parameters"])))
                    speed.restart(done)
                if _due(done, settings.checkpoint_every, settings) or interrupted():
                    checkpoints.save(done, state)
                    speed.restart(done)
                if interrupted():
                    raise KeyboardInterrupt
    return seen(state["parameters"])


def native_operations(make_model: Callable[..., nnx.Module]) -> dict[str, Callable[..., jax.Array]]:
    """The operations in float32 that `make_model` takes and that the C++ extension has for this device."""
    taken = {"multiply", "attend"} & taken_parameters(make_model)
    return {name: getattr(dense, name) for name in sorted(taken)} if dense.usable() else {}


def taken_parameters(make_model: Callable[..., nnx.Module]) -> set[str]:
    """What a model's class, or a `partial` of it, can be called with: what flax makes of a class takes anything."""
    return set(signature(getattr(make_model, "func", make_model).__init__).parameters)


@contextmanager
def patience() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C waits for the step in progress: the function says whether it came. A second one does not wait."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread hears signals
        return

    def heard(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = signal.signal(signal.SIGINT, heard)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


def on_devices(batch: Batch, mesh: Mesh | None) -> tuple[jax.Array, jax.Array]:
    """ids and counted; with a mesh, `batch` is this process' share of the rows, which all devices have a part of."""
    if mesh is None:
        return jnp.asarray(batch.ids), jnp.asarray(batch.counted)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    ids, counted = (jax.make_array_from_process_local_data(rows, part) for part in (batch.ids, batch.counted))
    return ids, counted


def placed(model: nnx.Module, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each parameter lies."""
    return {name: NamedSharding(mesh, spec) for name, spec in partition_specs(model).items()}


def initial_state(
    parameters: Parameters,
    optimizer: optax.GradientTransformation,
    shardings: Mapping[str, NamedSharding] | None = None,
) -> State:
    """The state before the first step; the optimizer's part lies on devices as the parameters do."""
    step, smoothed = jnp.zeros((), jnp.int32), jnp.zeros(())
    if shardings is not None:
        whole = NamedSharding(next(iter(shardings.values())).mesh, PartitionSpec())
        parameters = jax.device_put(parameters, dict(shardings))
        step, smoothed = jax.device_put((step, smoothed), whole)
    return {
        "parameters": parameters,
        "optimizer": jax.jit(optimizer.init)(parameters),
        "step": step,
        "smoothed_loss": smoothed,
    }


class Speed:
    """Tokens seen, tokens a second of training alone (a measurement or a checkpoint in between does not count), and
    MFU: what the model's matrix products need at that rate, as a share of the devices' peak."""

    def __init__(self, step: int, settings: Settings, flops_per_token: float) -> None:
        self.tokens_per_step = settings.batch_size * settings.sequence_length
        self.flops_per_token = flops_per_token
        self.peak = settings.peak_flops or jax.device_count() * measured_peak_flops(settings.dtype)
        self.restart(step)

    def restart(self, step: int) -> None:
        self.since, self.started = step, time.perf_counter()

    def measure(self, step: int) -> dict[str, float]:
        """`tokens` since step 0; `tokens_per_second` and `mfu` since the last call or restart."""
        per_second = (step - self.since) * self.tokens_per_step / (time.perf_counter() - self.started)
        self.restart(step)
        tokens = step * self.tokens_per_step
        return {"tokens": tokens, "tokens_per_second": per_second, "mfu": per_second * self.flops_per_token / self.peak}


def _due(step: int, every: int, settings: Settings) -> bool:
    return step % every == 0 or step == settings.steps


def _finite(loss: float, step: int) -> float:
    if not np.isfinite(loss):
        raise InputError(
            f"expected a finite loss; found {loss} at step {step}; lower the learning rate and start in another folder"
        )
    return loss
