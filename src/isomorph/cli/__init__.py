"""The command line: a function for each verb, which imports what it runs only when it runs.

Results go to stdout, tables and progress to stderr. With `--json` the last stdout line is one JSON document.
Exit code 0: done or passed. 1: a verdict that failed. 2: bad input or usage, said in one line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from isomorph.cli import demo, evaluate, generate, models, train, verify
from isomorph.cli.options import grouped
from isomorph.cli.output import say
from isomorph.errors import InputError
from isomorph.train import memory

app = typer.Typer(
    name="isomorph",
    help="Port a language model to another framework, prove that it is the same model, quantize it, run it anywhere.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
evaluate_app = typer.Typer(
    name="evaluate",
    help="Perplexity, divergence from a reference, and what a long greedy run does.",
    rich_markup_mode=None,
)

#: Exit code after Ctrl-C, as shells have it.
INTERRUPTED = 130

VERBS: dict[str, Callable[..., None]] = {
    "list": models.list_command,
    "inspect": models.inspect_command,
    "convert": models.convert_command,
    "quantize": models.quantize_command,
    "verify": verify.verify_command,
    "bench": evaluate.bench_command,
    "generate": generate.generate_command,
    "chat": generate.chat_command,
    "train": train.train_command,
    "demo": demo.demo_command,
}
EVALUATIONS: dict[str, Callable[..., None]] = {
    "perplexity": evaluate.perplexity_command,
    "divergence": evaluate.divergence_command,
    "degeneration": evaluate.degeneration_command,
    "table": evaluate.table_command,
}
for verb, command in VERBS.items():
    app.command(verb)(grouped(command))
for verb, command in EVALUATIONS.items():
    evaluate_app.command(verb)(grouped(command))
app.add_typer(evaluate_app)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from isomorph import __version__

        typer.echo(f"isomorph {__version__}")
        raise typer.Exit()


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code."""
    from typer.main import get_command

    command = get_command(app)
    try:
        result = command.main(args=arguments or ["--help"], prog_name="isomorph", standalone_mode=False)
        if result == INTERRUPTED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except InputError as error:
        say(f"isomorph: {error}")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        say("isomorph: interrupted; run it again (convert, quantize and train go on where they stopped)")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our stdout went away (`| head`); nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A full disk or a folder that may not be written, met anywhere: no fault of the code.
        where = error.filename or "its files"
        say(f"isomorph: expected to read and write {where}; found: {error.strerror or error}; see to it, run it again")
        return 2
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        # Usage errors come as the parser's own exceptions, which know how to say themselves.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        text = " ".join(str(message()).split()).rstrip(".")
        place = getattr(getattr(error, "ctx", None), "command_path", "isomorph")
        say(f"isomorph: {text}; see `{place} --help`")
        return 2


def main() -> None:
    """Entry point of the command `isomorph`."""
    # A model folder is data on this machine: no call home, and no warnings of libraries about each other.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.argv[1:2] == ["train"]:
        memory.keep()
    if sys.argv[1:2] in (["inspect"], ["convert"], ["quantize"]):
        # Nothing there multiplies matrices, and numpy's threads for that spin while they wait.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.exit(run(sys.argv[1:]))
