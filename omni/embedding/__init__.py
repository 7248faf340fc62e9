"""Turn many files of one modality into vectors, with an encoder alone, and search among them: `omni embed`."""

from omni.data.finding import SourceError, find_files
from omni.loading.encoder import Encoder, load_encoder

from .cluster import RayError
from .engine import Engine, EngineError
from .job import EmbeddingSummary, embed
from .searching import Hit, SearchError, SearchTable, duplicates, search
from .sheet import draw_sheet
from .table import TableError, describe

__all__ = [
    "EmbeddingSummary",
    "Encoder",
    "Engine",
    "EngineError",
    "Hit",
    "RayError",
    "SearchError",
    "SearchTable",
    "SourceError",
    "TableError",
    "describe",
    "draw_sheet",
    "duplicates",
    "embed",
    "find_files",
    "load_encoder",
    "search",
]
