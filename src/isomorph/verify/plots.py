"""Plots of a certificate: colours that colour-blind readers can tell apart, markers and labels that need no colour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isomorph.errors import InputError
from isomorph.verify.certificate import Level
from isomorph.verify.tolerance import MAX_NOISE_RATIO

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's palette, without its yellow, which is too light for lines.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC3311",
    "#CC79A7",
    "#56B4E9",
    "#6E6E6E",
)
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY)
MARKERS = ("o", "s", "^", "D", "v")


@contextmanager
def figure(path: Path, title: str, panels: int = 1, height: float = 4.2) -> Iterator[Any]:
    """Axes to draw on, `panels` side by side; the figure is saved to `path` on leaving."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError("plots need matplotlib, which is not installed; run: pip install 'isomorph[report]'") from None
    canvas: Figure = Figure(figsize=(4.6 + 3.9 * (panels - 1) + 2.2 * (panels == 1), height), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(1, panels, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9, colors="#333333")
        ax.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        ax.set_axisbelow(True)
    canvas.suptitle(title, fontsize=12, x=0.01, ha="left", fontweight="bold")
    yield axes
    canvas.savefig(path, dpi=150, facecolor="white", metadata={"Title": title})


def plot_layers(levels: Sequence[Level], path: Path) -> None:
    """Relative RMS error of every hidden state, candidate and reference, against the exact run; one panel a dtype."""
    with figure(path, "Error of each hidden state", len(levels)) as axes:
        for ax, level in zip(axes, levels):
            names = [short_name(tap.name) for tap in level.layers]
            x = np.arange(len(names))
            size = np.array([tap.size or 1.0 for tap in level.layers])
            error = np.array([tap.error for tap in level.layers]) / size
            floor = np.array([tap.floor for tap in level.layers]) / size
            if level.exact_dtype is not None:
                ax.fill_between(x, floor, MAX_NOISE_RATIO * floor, color=GREY, alpha=0.15, linewidth=0, label="allowed")
                ax.plot(x, floor, color=GREY, marker="s", markersize=4, label="noise floor")
            ax.plot(x, error, color=BLUE, marker="o", markersize=5, label="candidate")
            wrong = [i for i, tap in enumerate(level.layers) if tap.diverged]
            ax.plot(x[wrong], error[wrong], "X", color=RED, markersize=9, linestyle="none", label="beyond its limit")
            if not wrong:
                ax.lines[-1].remove()
            positive = np.concatenate([error[error > 0], floor[floor > 0]])
            if positive.size:
                ax.set_yscale("log")
                ax.set_ylim(positive.min() / 3, max(MAX_NOISE_RATIO * floor.max(), positive.max()) * 3)
            thin_ticks(ax, names)
            ax.set_xlabel("block", fontsize=10)
            against = f"against {level.exact_dtype}" if level.exact_dtype else "against the reference"
            ax.set_title(f"computing in {level.dtype}, {against}", fontsize=10, loc="left", color="#333333")
            ax.legend(frameon=False, fontsize=9, loc="best")
        axes[0].set_ylabel("RMS error / RMS of the state", fontsize=10)


def plot_agreement(levels: Sequence[Level], path: Path) -> None:
    """How often the most likely token is the same, by position in the prompt; one panel a dtype."""
    with figure(path, "Agreement of the most likely token, by position", len(levels)) as axes:
        for ax, level in zip(axes, levels):
            x = [(row["from"] + row["to"] - 1) / 2 for row in level.segments]
            lines = {"top1_agreement": "candidate and reference"}
            if level.exact_dtype:
                lines["candidate_to_exact"] = f"candidate and {level.exact_dtype}"
                lines["reference_to_exact"] = f"reference and {level.exact_dtype}"
            lowest = 100.0
            # Lines often coincide: later ones are thinner and broken, so that those beneath show.
            looks = zip(lines.items(), (BLUE, ORANGE, GREY), MARKERS, ((4.5, "-"), (2.5, "--"), (1.2, ":")))
            for (key, label), colour, marker, (width, style) in looks:
                y = [100 * row[key] for row in level.segments]
                lowest = min(lowest, *y)
                ax.plot(
                    x, y, style, color=colour, marker=marker, markersize=2 + 1.4 * width, linewidth=width, label=label
                )
            ax.set_ylim(max(0.0, lowest - max(1.0, 0.4 * (100 - lowest))), 100 + 0.08 * max(2.0, 100 - lowest))
            ax.set_xlabel("position in the prompt", fontsize=10)
            ax.set_title(f"computing in {level.dtype}", fontsize=10, loc="left", color="#333333")
            ax.legend(frameon=False, fontsize=9, loc="lower left")
        axes[0].set_ylabel("same most likely token, %", fontsize=10)


def plot_differences(levels: Sequence[Level], path: Path) -> None:
    """Distribution of the logits' absolute errors, candidate beside the reference's own; one panel a dtype."""
    with figure(path, "Errors of the logits", len(levels)) as axes:
        for ax, level in zip(axes, levels):
            if not level.histogram:
                ax.text(0.5, 0.5, "no finite difference", ha="center", va="center", transform=ax.transAxes)
                continue
            edges = np.array(level.histogram["edges"])
            for key, colour, style in (("reference", GREY, "--"), ("candidate", BLUE, "-")):
                if key in level.histogram:
                    counts = np.array(level.histogram[key], dtype=float)
                    label = "candidate" if key == "candidate" else "reference's own rounding"
                    ax.stairs(counts / counts.sum(), edges, color=colour, linestyle=style, linewidth=1.6, label=label)
            ax.set_xscale("log")
            ax.set_xlabel("absolute error of a logit", fontsize=10)
            against = f"against {level.exact_dtype}" if level.exact_dtype else "against the reference"
            ax.set_title(f"computing in {level.dtype}, {against}", fontsize=10, loc="left", color="#333333")
            ax.legend(frameon=False, fontsize=9, loc="upper left")
        axes[0].set_ylabel("share of logits", fontsize=10)


def plot_variants_layers(levels: Mapping[str, Level], path: Path) -> None:
    """Relative RMS error of every hidden state of several candidates, each against its judge's exact run."""
    with figure(path, "Error of each hidden state, computing in float32") as (ax,):
        names: list[str] = []
        limits: list[np.ndarray] = []
        for (label, level), colour, marker in zip(levels.items(), COLOURS, MARKERS):
            names = [short_name(tap.name) for tap in level.layers]
            size = np.array([tap.size or 1.0 for tap in level.layers])
            x, error = np.arange(len(names)), np.array([tap.error for tap in level.layers]) / size
            floor = np.array([tap.floor for tap in level.layers]) / size
            limits.append(MAX_NOISE_RATIO * floor)
            ax.plot(x, error, color=colour, marker=marker, markersize=5, label=label)
        if limits:
            ax.plot(np.min(limits, axis=0), color=GREY, linestyle="--", linewidth=1.2, label="limit")
        ax.set_yscale("log")
        thin_ticks(ax, names)
        ax.set_xlabel("block", fontsize=10)
        ax.set_ylabel("RMS error / RMS of the state", fontsize=10)
        ax.set_title("against float64 on the same weights", fontsize=10, loc="left", color="#333333")
        ax.legend(frameon=False, fontsize=9)


def plot_variants_agreement(figures: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """How often each candidate's most likely token is the reference's: one bar each, with its value."""
    with figure(path, "Same most likely token as the original") as (ax,):
        names = list(figures)
        values = [100 * figures[name]["top1_agreement"] for name in names]
        bars = ax.barh(names, values, color=BLUE, height=0.55)
        ax.bar_label(bars, [f"{value:.1f} %" for value in values], padding=4, fontsize=10)
        ax.set_xlim(0, 112)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set_xticks([0, 25, 50, 75, 100])
        ax.set_xlabel("positions, %", fontsize=10)


def short_name(tap: str) -> str:
    """`embedding` -> `emb`, `block 3` -> `3`."""
    return "emb" if tap == "embedding" else tap.removeprefix("block ")


def thin_ticks(ax: Axes, names: Sequence[str], most: int = 12) -> None:
    """Label at most `most` ticks, always the first and the last."""
    step = max(1, -(-(len(names) - 1) // most))
    shown = sorted({0, *range(1, len(names), step), len(names) - 1})
    if len(shown) > 2 and shown[-1] - shown[-2] < step:
        shown.pop(-2)
    ax.set_xticks(shown, [names[i] for i in shown])
