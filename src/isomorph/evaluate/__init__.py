"""Perplexity, divergence and degeneration: one token stream, one definition of each number, one record schema."""

from isomorph.evaluate.degeneration import degeneration
from isomorph.evaluate.divergence import divergence
from isomorph.evaluate.perplexity import perplexity
from isomorph.evaluate.protocols import PROTOCOLS, Protocol
from isomorph.evaluate.record import Record
from isomorph.evaluate.table import table
from isomorph.evaluate.throughput import Throughput, throughput

__all__ = [
    "PROTOCOLS",
    "Protocol",
    "Record",
    "Throughput",
    "degeneration",
    "divergence",
    "perplexity",
    "table",
    "throughput",
]
