"""Turn many files of one modality into vectors, with an encoder alone: `omni embed`."""

from omni.loading.encoder import Encoder, load_encoder

from .cluster import RayError
from .engine import Engine, EngineError
from .job import EmbeddingSummary, embed
from .sources import SourceError, find_files
from .table import TableError, describe

__all__ = [
    "EmbeddingSummary",
    "Encoder",
    "Engine",
    "EngineError",
    "RayError",
    "SourceError",
    "TableError",
    "describe",
    "embed",
    "find_files",
    "load_encoder",
]
