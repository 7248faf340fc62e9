"""Checkpoints of micro-Omni, the system that the seed document describes, become checkpoints of omni, and go back.

    convert(["omni.pt", "vision.pt", "tokenizer.model"], "mine")     # a folder that AutoModel and `omni ask` take
    to_micro_omni("mine", "theirs")                                  # omni.pt, vision.pt, tokenizer.model, config.json

    files       what micro-Omni writes: which part stands under which name in which file, read without running anything
    weights     which tensor is which, on both sides, and the configurations that follow from them
    tokenizer   SentencePiece BPE as a fast tokenizer of transformers
    run         the two ways

No value is changed: a tensor is renamed, cut or joined, and the way back is equal bit for bit.
"""

from omni.exchange.micro_omni.convert import Conversion, convert, to_micro_omni
from omni.exchange.micro_omni.files import ConversionError

__all__ = ["Conversion", "ConversionError", "convert", "to_micro_omni"]
