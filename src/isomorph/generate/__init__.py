"""Text from a model: generation, streaming and conversation, the same code in every framework.

    prompts -> engine (a decode state fed in chunks, then token by token) -> sampling -> text, until stopping says so

Only `DecodeState.feed` differs between frameworks; sampling is numpy, so a seed gives the same tokens everywhere.
"""

from __future__ import annotations

from isomorph.generate.answers import TextStream, generate, stream
from isomorph.generate.conversation import Conversation
from isomorph.generate.engine import Generation
from isomorph.generate.options import Options
from isomorph.generate.prompts import encode, encode_messages, has_chat_template
from isomorph.generate.sampling import Sampling
from isomorph.generate.stopping import StopRules, chat_markers, stop_rules

__all__ = [
    "Conversation",
    "Generation",
    "Options",
    "Sampling",
    "StopRules",
    "TextStream",
    "chat_markers",
    "encode",
    "encode_messages",
    "generate",
    "has_chat_template",
    "stop_rules",
    "stream",
]
