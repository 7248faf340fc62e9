"""A modality is one frozen bundle. Plug-ins import it from here, with the errors that its `open` raises."""

from .bundle import ENTRY_POINT_GROUP, Modality
from .errors import ItemError, ItemProblem, LargeItemError, MissingItemError
from .packed import Packed

__all__ = [
    "ENTRY_POINT_GROUP",
    "ItemError",
    "ItemProblem",
    "LargeItemError",
    "MissingItemError",
    "Modality",
    "Packed",
]
