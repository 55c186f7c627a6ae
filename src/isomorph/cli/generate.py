"""`isomorph generate` and `isomorph chat`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from isomorph.cli.options import Json, Loading
from isomorph.cli.output import print_json, say

if TYPE_CHECKING:
    from isomorph.generate import Options

System = Annotated[str | None, typer.Option(help="System message.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Tokens per second and time to first token, on stderr.")]
MaxTokens = Annotated[int, typer.Option(help="The most new tokens.")]


@dataclass(frozen=True)
class Answering:
    """How an answer is drawn and where it ends: the options of `generate`."""

    max_tokens: MaxTokens = 256
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that have this probability together.")] = 1.0
    top_k: Annotated[int, typer.Option(help="Keep this many of the likeliest tokens; 0 keeps all.")] = 0
    min_p: Annotated[float, typer.Option(help="Keep tokens at least this fraction as likely as the likeliest.")] = 0.0
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens that were there less likely.")] = 1.0
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None
    stop: Annotated[list[str] | None, typer.Option(help="End the answer at this text; may be repeated.")] = None
    max_kv_size: Annotated[int | None, typer.Option(help="The most tokens of prompt and answer together.")] = None
    analysis: Annotated[bool, typer.Option("--analysis", help="Of gpt-oss: show what it thinks, too.")] = False
    reasoning: Annotated[str | None, typer.Option(help="Of gpt-oss: low, medium or high, for its template.")] = None

    def options(self) -> Options:
        """As the generator takes them. Raises InputError."""
        from isomorph.generate import Options

        given = dict(vars(self))
        effort = given.pop("reasoning")
        template = None if effort is None else {"reasoning_effort": effort}
        return Options(show_analysis=given.pop("analysis"), chat_template=template, **given)


@dataclass(frozen=True)
class Chatting(Answering):
    """Answers of a conversation may be longer."""

    max_tokens: MaxTokens = 512


def generate_command(
    source: str,
    prompt: Annotated[str | None, typer.Option(help="The text to continue or answer; default: stdin.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids instead of a text: 1,2,3.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="With the chat template or without; default: with, if any.")
    ] = None,
    system: System = None,
    *,
    answering: Answering,
    loading: Loading,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Answer or continue one prompt, streaming the text to stdout."""
    from isomorph.generate.terminal import answer, as_prompt, read_prompt, speeds

    given, options = read_prompt(prompt, ids), answering.options()
    model = loading.load(source)
    result = answer(model, as_prompt(model, given, system, chat), show=not as_json, **vars(options))
    if verbose:
        say(speeds(result))
    if as_json:
        print_json(result)


def chat_command(
    source: str, system: System = None, *, chatting: Chatting, loading: Loading, verbose: Verbose = False
) -> None:
    """Talk with a model: turns with history, /reset, /exit; Ctrl-C stops an answer."""
    from isomorph.generate import Conversation
    from isomorph.generate.terminal import chat_loop

    options = chatting.options()
    chat_loop(Conversation(loading.load(source), system, **vars(options)), verbose)
