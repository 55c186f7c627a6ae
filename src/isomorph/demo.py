"""`isomorph demo`: the whole pipeline on a small trained Talkie, offline, in minutes.

Transformers -> MLX and Flax, 8-bit and 4-bit; each verified against the original and asked the same question.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isomorph.convert import convert
from isomorph.errors import InputError
from isomorph.load import load
from isomorph.pocket import path as pocket_path
from isomorph.progress import progress
from isomorph.quantize import quantize
from isomorph.records import to_json
from isomorph.verify import Certificate, verify
from isomorph.verify.report import number, percent, summary, table, write_report

if TYPE_CHECKING:
    from isomorph.verify.certificate import Level

QUESTION = "What is the use of the steam engine?"
ANSWER_TOKENS = 60
PAGE = "report.md"

#: Tokens compared, and generated greedily, with each variant. MLX's quantized products take 20 times as long on a CPU.
TOKENS, GREEDY_TOKENS = 512, 128
QUANTIZED_TOKENS, QUANTIZED_GREEDY_TOKENS = 128, 48


@dataclass(frozen=True)
class Step:
    """One variant: its name, the framework it runs in, and how its folder is made of the original."""

    name: str
    framework: str
    make: Callable[[Path, Path], Any] | None = None
    quantized: bool = False


STEPS = (
    Step("torch", "torch"),
    Step("mlx", "mlx", lambda source, target: convert(source, target, to="mlx", force=True)),
    Step("flax", "flax", lambda source, target: convert(source, target, to="flax", force=True)),
    Step("mlx-8bit", "mlx", lambda source, target: quantize(source, target, bits=8, force=True), quantized=True),
    Step("mlx-4bit", "mlx", lambda source, target: quantize(source, target, bits=4, force=True), quantized=True),
)


@dataclass
class Variant:
    """What became of one step. `certificate` is None for the original, which is the reference."""

    name: str
    framework: str
    path: Path
    payload_bytes: int
    bits_per_weight: float
    answer: str = ""
    certificate: Certificate | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Demo:
    """The result: truthy when every variant passed."""

    folder: Path
    question: str
    variants: list[Variant]

    def __bool__(self) -> bool:
        checked = [variant.certificate for variant in self.variants if variant.certificate is not None]
        return bool(checked) and all(checked)

    def to_json(self) -> dict[str, Any]:
        """The figures of each variant; the whole certificates are in the folders beside."""
        return to_json({"passed": bool(self), "question": self.question, "variants": [_row(v) for v in self.variants]})


def demo(out: str | Path = "demo-report", steps: tuple[Step, ...] = STEPS) -> Demo:
    """Run the pipeline on the pocket model; models, reports, plots and report.md go into the folder `out`.

    What is there of an earlier run is replaced. Raises InputError when the folder cannot be written, or is not one
    that an earlier run made.
    """
    folder = Path(out).expanduser()
    _claim(folder)
    source = pocket_path()
    variants = []
    with progress("demo", 3 * len(steps) - 2, "steps") as advance:
        for step in steps:
            variants.append(_variant(step, source, folder, advance))
    result = Demo(folder, QUESTION, variants)
    _write(result)
    return result


def _variant(step: Step, source: Path, folder: Path, advance: Callable[..., None]) -> Variant:
    from isomorph.checkpoint import open_checkpoint
    from isomorph.verify.side import parameters

    seconds: dict[str, float] = {}

    def timed(what: str, action: Callable[[], Any]) -> Any:
        advance(0, f"{step.name}: {what}")
        start = time.perf_counter()
        value = action()
        seconds[what] = round(time.perf_counter() - start, 2)
        advance(1)
        return value

    target = source
    if step.make is not None:
        target = folder / "models" / step.name
        make = step.make
        timed("converting" if not step.quantized else "quantizing", lambda: make(source, target))
    checkpoint = open_checkpoint(target)
    payload = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    bits_per_weight = 8 * payload / parameters(checkpoint)
    variant = Variant(step.name, step.framework, target, payload, bits_per_weight, seconds=seconds)
    if step.make is not None:
        variant.certificate = timed("verifying", lambda: _verified(step, source, target, advance))
        write_report(variant.certificate, folder / step.name)
    variant.answer = timed("answering", lambda: _answer(step, target))
    return variant


def _verified(step: Step, source: Path, target: Path, advance: Callable[..., None]) -> Certificate:
    return verify(
        source,
        target,
        candidate_framework=step.framework,
        tokens=QUANTIZED_TOKENS if step.quantized else TOKENS,
        greedy_tokens=QUANTIZED_GREEDY_TOKENS if step.quantized else GREEDY_TOKENS,
        say=lambda what: advance(0, f"{step.name}: verifying, {what}"),
    )


def _answer(step: Step, target: Path) -> str:
    model = load(target, framework=step.framework)
    asked: Any = QUESTION
    if getattr(model.tokenizer, "chat_template", None):
        asked = [{"role": "user", "content": QUESTION}]
    answer = model.generate(asked, max_tokens=ANSWER_TOKENS)
    assert not isinstance(answer, list)
    return answer.text.strip()


def _claim(folder: Path) -> None:
    """Make `folder`, or take over that of an earlier run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / "models").is_dir():
            raise InputError(f"expected an empty folder or one of an earlier demo; found other files in {folder}")
        (folder / "models").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(
            f"expected a folder to write to; found {folder}: {error.strerror}; choose another --out"
        ) from None


# --- the page --------------------------------------------------------------------------------------------------------


def _write(result: Demo) -> None:
    from isomorph.verify.plots import plot_variants_agreement, plot_variants_layers

    levels: dict[str, Level] = {v.name: v.certificate.levels[-1] for v in result.variants if v.certificate}
    plot_variants_layers(levels, result.folder / "layers.png")
    shares = {v.name: v.certificate.logits for v in result.variants if v.certificate and v.certificate.logits}
    plot_variants_agreement(shares, result.folder / "agreement.png")
    (result.folder / "report.json").write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
    (result.folder / PAGE).write_text(page(result), encoding="utf-8")


def page(result: Demo) -> str:
    """The demo's report.md."""
    header, *rows = cells(result)
    linked = [[f"[{row[0]}]({row[0]}/report.md)" if row[3] != "reference" else row[0], *row[1:]] for row in rows]
    parts = [
        "# isomorph demo",
        "A small Talkie, trained on books printed before 1931, ported from Transformers to MLX and Flax and quantized. "
        "Each variant is measured against the original; a noise ratio near 1 means that it errs as much as the "
        "original's own rounding does. A quantized variant differs from the original by design: its arithmetic is "
        "judged on its own dequantized weights, and KL says what the bits cost.",
        table(header, linked),
        "![Relative error of every hidden state, computing in float32, for each variant](layers.png)",
        "![How often each variant's most likely token is the original's](agreement.png)",
        f"## The same question to each\n\n> {result.question}",
        table(("variant", "answer"), [(v.name, " ".join(v.answer.split())) for v in result.variants]),
    ]
    for variant in result.variants:
        if variant.certificate is not None and not variant.certificate:
            parts.append(f"**{variant.name} failed.** {summary(variant.certificate)}")
    return "\n\n".join(parts) + "\n"


def cells(result: Demo) -> list[list[str]]:
    """The table of the page and of the terminal: a header, then a row a variant."""
    rows = [["variant", "MB", "bits", "verdict", "max diff", "noise ratio", "top-1", "KL, nats", "s"]]
    for variant in result.variants:
        row = [variant.name, f"{variant.payload_bytes / 1e6:.1f}", f"{variant.bits_per_weight:.2f}"]
        certificate, seconds = variant.certificate, f"{sum(variant.seconds.values()):.0f}"
        if certificate is None:
            rows.append([*row, "reference", "", "", "", "", seconds])
            continue
        figures = certificate.logits
        measured = [
            number(figures["max_abs"]),
            number(certificate.noise_ratio),
            percent(figures["top1_agreement"]),
            number(figures["kl_nats_per_token"]),
        ]
        rows.append([*row, "passed" if certificate else "FAILED", *measured, seconds])
    return rows


def print_demo(result: Demo) -> None:
    """The table, the answers and what to look at next, on stderr."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(stderr=True)
    header, *rows = cells(result)
    figures = Table(
        title="Talkie in each framework, against Transformers", box=None, pad_edge=False, title_justify="left"
    )
    for index, name in enumerate(header):
        figures.add_column(name, justify="left" if index in (0, 3) else "right", no_wrap=True)
    styles = {"passed": "[green]passed[/]", "FAILED": "[bold red]FAILED[/]"}
    for row in rows:
        figures.add_row(*(styles.get(cell, escape(cell)) for cell in row))
    answers = Table(title=f"{QUESTION}", box=None, pad_edge=False, show_header=False, title_justify="left")
    for variant in result.variants:
        answers.add_row(variant.name, escape(" ".join(variant.answer.split())))
    console.print(figures, "", answers, "", sep="\n")
    console.print(
        f"report   {result.folder / PAGE}\n"
        f"models   {result.folder / 'models'}\n"
        f"next     isomorph chat {result.folder / 'models' / 'mlx'} --framework mlx\n"
        f"         isomorph verify {pocket_path()} {result.folder / 'models' / 'mlx-4bit'} --report verify-report\n"
        "         isomorph convert YOUR-MODEL TARGET --to mlx --dry-run",
        highlight=False,
        soft_wrap=True,
    )


def _row(variant: Variant) -> dict[str, Any]:
    certificate = variant.certificate
    verdict: dict[str, Any] = {"passed": None}
    if certificate is not None:
        verdict = {
            "passed": certificate.passed,
            "logits": certificate.logits,
            "noise_ratio": certificate.noise_ratio,
            "first_divergence": certificate.first_divergence,
        }
    plain = {key: value for key, value in vars(variant).items() if key != "certificate"}
    return {**plain, **verdict}
