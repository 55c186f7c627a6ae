"""Every build of a gpt-oss that is published or better, made from one source and measured.

    python benchmarks/variants.py SOURCE --text WIKITEXT/test.txt --out FOLDER

Writes each variant to FOLDER, measures perplexity and the divergence from the source by the protocol `gpt-oss` (torch,
float32), and prints a Markdown table. What FOLDER has already is not made again; the last line is one JSON document.
`--plot FILE.png` draws the divergence against the size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import isomorph
from isomorph.evaluate import divergence, perplexity, table
from isomorph.progress import progress
from isomorph.quantize.write import quantize
from isomorph.verify.plots import BLUE, GREY, ORANGE, figure

#: Row of the table -> options of `isomorph quantize`. "published" rounds the experts' grid away, as cards have it.
VARIANTS: dict[str, dict[str, Any]] = {
    "lossless: experts as they are, the rest 8-bit / 64": {"recipe": "lossless"},
    "lossless, experts in affine 5-bit / 32": {"recipe": "lossless", "overrides": ["expert=5/32"]},
    "8-bit / 64, published": {"bits": 8, "group_size": 64, "requantize": True},
    "6-bit / 32, published": {"bits": 6, "group_size": 32, "requantize": True},
    "6-bit / 32, experts exact": {"bits": 6, "group_size": 32},
    "5-bit / 32, published": {"bits": 5, "group_size": 32, "requantize": True},
    "5-bit / 32, experts exact": {"bits": 5, "group_size": 32},
    "4-bit / 32, published": {"bits": 4, "group_size": 32, "requantize": True},
}

SOURCE = "source: experts MXFP4, the rest bfloat16"

#: Logits of one model that are kept in memory, at most: those of the pocket on the protocol's 100,000 tokens.
KEPT_BYTES = 1 << 29


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    text = options.text.read_text(encoding="utf-8")
    source = remembering(load(options.source))
    rows, records = [(SOURCE, isomorph.inspect(options.source).path)], []
    measured = {"text": text, "protocol": "gpt-oss", "limit": options.limit}
    for number, (name, settings) in enumerate(VARIANTS.items()):
        folder = options.out / f"variant{number}"
        if not folder.exists():
            quantize(options.source, folder, **settings)
        rows.append((name, folder))
    for number, (name, folder) in enumerate(rows):
        model = None if number else source
        for what, measure in (("perplexity", perplexity), ("divergence", partial(divergence, source))):
            kept = options.out / f"{what}{number}-{options.limit}.json"
            if not kept.is_file():
                model = model or remembering(load(folder))
                with progress(f"{what}: {name}", options.limit, "tokens") as advance:
                    kept.write_text(json.dumps(measure(model, **measured, advance=advance).to_json()))
            records.append(json.loads(kept.read_text()))
    sizes = {name: isomorph.inspect(folder) for name, folder in rows}
    if options.plot is not None:
        plot({name: found.payload_bytes for name, found in sizes.items()}, records[1::2], options.plot)
    print("| model | bytes | bits a weight |", "|---|---|---|", sep="\n")
    for name, found in sizes.items():
        print(f"| {name} | {found.payload_bytes:,} | {found.bits_per_weight:.3f} |")
    print("", table(records, {str(folder): name for name, folder in rows}), "", sep="\n")
    print(json.dumps({"sizes": {name: found.payload_bytes for name, found in sizes.items()}, "records": records}))


def plot(sizes: Mapping[str, int], divergences: Sequence[Mapping[str, Any]], path: Path) -> None:
    """KL to the source against the size of each build; bars are two standard errors. The source itself is a line."""
    unit, divisor = ("GB", 1e9) if max(sizes.values()) > 1e9 else ("MB", 1e6)
    with figure(path, "Builds of one gpt-oss: size and divergence from the source") as (ax,):
        for (name, size), record in zip(sizes.items(), divergences):
            if name == SOURCE:
                ax.axvline(size / divisor, color=GREY, linestyle=":")
                ax.annotate("the source", (size / divisor, 0.98), (4, 0), fontsize=8, color=GREY, va="top",
                            xycoords=("data", "axes fraction"), textcoords="offset points")  # fmt: skip
                continue
            kl, published = record["results"]["kl"], "published" in name
            place = size / divisor, kl["mean"]
            colour, marker = (ORANGE, "s") if published else (BLUE, "o")
            ax.errorbar(*place, yerr=2 * kl["standard_error"], color=colour, marker=marker, capsize=2)
            ax.annotate(name.partition(":")[0], place, (7, 0), fontsize=8, va="center", textcoords="offset points",
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
        ax.set_yscale("log")
        ax.margins(x=0.15)
        ax.set_xlabel(f"size, {unit}")
        ax.set_ylabel("KL, nats per token")


def load(folder: str | Path) -> Any:
    return isomorph.load(folder, framework="torch", dtype="float32")


def remembering(model: Any) -> Any:
    """`model`, which computes a window once: perplexity and divergence ask for the same ones."""
    compute, found = model.logits, {}

    def logits(ids: np.ndarray) -> np.ndarray:
        key = ids.tobytes()
        if key in found:
            return found[key]
        value = compute(ids)
        if value.nbytes * (len(found) + 1) <= KEPT_BYTES:
            found[key] = value
        return value

    model.logits = logits
    return model


if __name__ == "__main__":
    main()
