"""The command line: one short section a verb, each importing what it runs only when it runs.

Results go to stdout, tables and progress to stderr. With `--json` the last stdout line is one JSON document.
Exit code 0: done or passed. 1: a verdict that failed. 2: bad input or usage, said in one line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from isomorph.errors import InputError

app = typer.Typer(
    name="isomorph",
    help="Port a language model to another framework, prove that it is the same model, quantize it, run it anywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing target folder.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and the sizes; write nothing.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run modelling code that the repository ships.")]
Framework = Annotated[str, typer.Option(help="torch, mlx or flax.")]
Dtype = Annotated[str | None, typer.Option(help="Compute dtype: float32, bfloat16 or float16; default as stored.")]


def print_json(document: Any) -> None:
    """One line of JSON on stdout; NaN and infinities, which JSON lacks, become null."""
    from isomorph.records import to_json

    sys.stdout.write(json.dumps(to_json(document), allow_nan=False) + "\n")


def say(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr)


# --- list ------------------------------------------------------------------------------------------------------------


# --- inspect ---------------------------------------------------------------------------------------------------------


# --- convert ---------------------------------------------------------------------------------------------------------


# --- quantize --------------------------------------------------------------------------------------------------------


# --- verify ----------------------------------------------------------------------------------------------------------


# --- evaluate --------------------------------------------------------------------------------------------------------


# --- generate --------------------------------------------------------------------------------------------------------


# --- chat ------------------------------------------------------------------------------------------------------------


# --- train -----------------------------------------------------------------------------------------------------------


# --- demo ------------------------------------------------------------------------------------------------------------


# --- errors and exit codes -------------------------------------------------------------------------------------------


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
        result = command.main(args=arguments, prog_name="isomorph", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except InputError as error:
        say(f"isomorph: {error}")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        say("isomorph: interrupted; run the same command again to go on where it stopped")
        return 130
    except BrokenPipeError:
        # The reader of our stdout went away (`| head`); nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        # Usage errors come as the parser's own exceptions, which know how to say themselves.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        text = " ".join(str(message()).split())
        say(f"isomorph: {text}; see `isomorph {' '.join(arguments[:1])} --help`" if text else "isomorph: see --help")
        return 2


def main() -> None:
    """Entry point of the command `isomorph`."""
    # A model folder is data on this machine: no call home, and no warnings of libraries about each other.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run(sys.argv[1:]))
