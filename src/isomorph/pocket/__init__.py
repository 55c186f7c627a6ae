"""Small trained models that come with isomorph, so that everything runs offline.

`talkie` was made from 57 books printed before 1931 by

    isomorph train --preset pocket --data BOOKS --held-out BOOKS/heldout \\
        --chat-data BOOKS/bourne-catechism-of-the-steam-engine.txt \\
        --chat-data BOOKS/catechism-of-christian-doctrine.txt --out RUN

whose `RUN/model` it is; `talkie/data.csv` says where to get each book. `talkie/heldout.txt` holds whole chapters of
books it was not trained on. `gelu_gpt` was made from the train split of WikiText-2 by

    isomorph train --depth 2 --vocab-size 1024 --seq-len 512 --batch 8 --seeds 3 --other-seeds 0.25 \\
        --data WIKITEXT/train.txt --held-out WIKITEXT/valid.txt --format wikitext --out RUN

and `gpt_oss` from the same by

    isomorph train --preset pocket-gpt-oss --data WIKITEXT/train.txt --held-out WIKITEXT/valid.txt \\
        --format wikitext --out RUN
"""

from __future__ import annotations

from pathlib import Path

from isomorph.errors import InputError, did_you_mean

FOLDER = Path(__file__).parent

HELDOUT_FILE = "heldout.txt"


def names() -> list[str]:
    """The models there are."""
    return sorted(config.parent.name for config in FOLDER.glob("*/config.json"))


def path(name: str = "talkie") -> Path:
    """The folder of a pocket model, in the layout `transformers`. Raises InputError for a name that is none."""
    if name not in names():
        known = ", ".join(names()) or "none"
        raise InputError(f"expected a pocket model of {known}; found {name!r}{did_you_mean(name, names())}")
    return FOLDER / name


def heldout_text(name: str = "talkie") -> str:
    """About 200 kB of public-domain English that the model was not trained on."""
    return (path(name) / HELDOUT_FILE).read_text(encoding="utf-8")
