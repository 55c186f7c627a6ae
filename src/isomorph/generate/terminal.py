"""Generation at a terminal: where the prompt comes from, text as it comes, and the chat loop."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from isomorph.errors import InputError
from isomorph.frameworks.model import Model
from isomorph.generate.answers import TextStream, generate, stream
from isomorph.generate.conversation import Conversation
from isomorph.generate.engine import Generation
from isomorph.generate.prompts import has_chat_template
from isomorph.generate.text import REPLACEMENT

#: Control characters other than tab and newline.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"


def read_prompt(text: str | None, ids: str | None) -> str | list[int]:
    """The prompt of `--prompt`, of `--ids`, or of stdin when neither is given and it is not a terminal."""
    if text is not None and ids is not None:
        raise InputError("expected one prompt; found --prompt and --ids; give one of them")
    if ids is not None:
        fields = re.split(r"[\s,]+", ids.strip().strip("[]").strip())
        if not all(re.fullmatch(r"-?\d+", field) for field in fields):
            raise InputError(f"expected --ids as whole numbers with commas between; found {ids[:60]!r}")
        return [int(field) for field in fields]
    if text is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise InputError("expected a prompt; found none; give --prompt TEXT or --ids 1,2,3, or pipe text in")
        _tolerate_any_text()
        # What `echo` adds is not meant.
        text = sys.stdin.read().removesuffix("\n")
    return text


def as_prompt(model: Model, prompt: str | list[int], system: str | None, chat: bool | None) -> Any:
    """What to ask `model`: a text becomes messages when `chat`, or when None and its tokenizer has a chat template."""
    if isinstance(prompt, str):
        if not prompt:
            raise InputError("expected at least one token; found an empty prompt; give a prompt")
        if chat or (chat is None and has_chat_template(model)):
            instruction = [] if system is None else [{"role": "system", "content": system}]
            return [*instruction, {"role": "user", "content": prompt}]
    elif chat:
        raise InputError("expected a text for --chat; found ids; give --prompt, or ids that are a whole chat prompt")
    if system is not None:
        raise InputError("expected --system with a chat prompt only; this one is raw; leave it out or give --chat")
    return prompt


def answer(model: Model, prompt: Any, show: bool, **options: Any) -> Generation:
    """Generate, and `show` the answer on stdout as it comes: its text, or its ids when the model has no tokenizer."""
    if not show or model.tokenizer is None:
        result = generate(model, prompt, **options)
        assert isinstance(result, Generation)
        if show:
            print(*result.token_ids, flush=True)
        return result
    pieces = stream(model, prompt, **options)
    _show(pieces)
    assert pieces.result is not None
    return pieces.result


def speeds(result: Generation) -> str:
    """One line about how an answer came about."""
    rate = result.generation_tokens_per_second
    return (
        f"prompt {result.prompt_tokens} tokens at {result.prompt_tokens_per_second:.1f} tokens/s, "
        f"first token after {result.time_to_first_token_seconds:.3f} s, "
        f"answer {result.generation_tokens} tokens{f' at {rate:.1f} tokens/s' if rate is not None else ''} "
        f"({result.finish_reason})"
    )


def chat_loop(conversation: Conversation, verbose: bool) -> None:
    """Read a line, answer it, until Ctrl-D or `/exit`. Answers go to stdout, everything else to stderr."""
    _tolerate_any_text()
    terminal = sys.stdin.isatty()
    if terminal:
        # Line editing and history at the terminal, where the platform has it.
        with suppress(ImportError):
            import readline  # noqa: F401
        _say(HELP)
    while True:
        try:
            text = input("> " if terminal and sys.stdout.isatty() else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            _say(f"\n{HELP}")
            continue
        if text in ("/exit", "/quit"):
            break
        if text == "/reset":
            conversation.reset()
            _say("(the conversation starts anew)")
        elif text.startswith("/"):
            _say(f"(unknown command; {HELP})")
        elif text:
            _turn(conversation, text, verbose)


def _turn(conversation: Conversation, text: str, verbose: bool) -> None:
    try:
        pieces = conversation.say(text)
        if conversation.dropped:
            _say(f"(the context is full: {conversation.dropped} of the oldest turns dropped)")
        with _stoppable(pieces):
            _show(pieces)
    except InputError as error:
        _say(f"({error})")
        return
    except KeyboardInterrupt:
        # A second Ctrl-C, in the middle of a step.
        _say("\n(stopped; this turn is forgotten)")
        return
    assert pieces.result is not None
    if pieces.result.finish_reason == "interrupted":
        _say("(stopped)")
    elif pieces.result.finish_reason == "length":
        _say("(cut off: --max-tokens or the context is used up)")
    if verbose:
        _say(f"({speeds(pieces.result)})")


@contextmanager
def _stoppable(pieces: TextStream) -> Iterator[None]:
    """While the block runs, the first Ctrl-C lets the answer end after the current token; the second is at once."""

    def handler(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pieces.interrupt()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _show(pieces: TextStream) -> None:
    try:
        for piece in pieces:
            # A terminal obeys control characters; those of a model are not shown there.
            sys.stdout.write(CONTROL.sub(REPLACEMENT, piece) if sys.stdout.isatty() else piece)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tolerate_any_text() -> None:
    """A byte on stdin that is not UTF-8 becomes U+FFFD; a character that stdout cannot say becomes `?`."""
    for channel in (sys.stdin, sys.stdout):
        reconfigure = getattr(channel, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
