"""Pictures to vectors, many and fast: encoders alone, without a question."""

from omni.loading.encoder import Encoder, load_encoder

from .engine import Engine, EngineError
from .job import Report, embed
from .ray_engine import RayError
from .sources import SourceError, find_pictures
from .table import TableError, describe

__all__ = [
    "Encoder",
    "Engine",
    "EngineError",
    "RayError",
    "Report",
    "SourceError",
    "TableError",
    "describe",
    "embed",
    "find_pictures",
    "load_encoder",
]
