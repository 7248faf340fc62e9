"""Convert checkpoints of micro-Omni to omni's and back. micro-Omni is the system that the seed document belongs to.

    convert(["omni.pt", "vision.pt", "tokenizer.model"], "mine")     # a folder that AutoModel and `omni ask` take
    to_micro_omni("mine", "theirs")                                  # omni.pt, vision.pt, tokenizer.model, config.json

    files       micro-Omni's files: the name and the file of each part
    weights     the tensor of omni for each tensor of micro-Omni
    settings    the configuration of each part
    tokenizer   SentencePiece BPE as a fast tokenizer of transformers
    parts       the parts that both have
    incoming    from micro-Omni
    outgoing    to micro-Omni

No value changes: a tensor is renamed, split or concatenated. After both conversions it is equal bit for bit.
"""

from omni.exchange.micro_omni.files import ConversionError
from omni.exchange.micro_omni.incoming import convert
from omni.exchange.micro_omni.outgoing import to_micro_omni
from omni.exchange.micro_omni.parts import Conversion

__all__ = ["Conversion", "ConversionError", "convert", "to_micro_omni"]
