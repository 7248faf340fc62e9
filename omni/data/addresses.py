"""Files at addresses, such as "https://...", "s3://..." or "hf://...": fetched once, by fsspec, into a folder.

Nothing is fetched unless the user names that folder. A file in it is not fetched again; remove it to fetch it once more.
"""

import hashlib
import os
import re
import tempfile
from glob import has_magic
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from omni.data.sources import ManifestError, is_address
from omni.downloads import download
from omni.files import ReadError
from omni.items import MAX_BYTES
from omni.modality import ItemError, LargeItemError, MissingItemError


class Limit(NamedTuple):
    """How large a file at an address may be, in bytes, and how many seconds it may take."""

    bytes: int
    seconds: float


OF_ITEMS = Limit(MAX_BYTES, 600)
"""For the file of an item."""

OF_ROWS = Limit(2**36, 24 * 3600)
"""For a file of rows. A larger data set has several."""


def local(address: str, folder: Path) -> Path:
    """Where the file of an address is kept in a folder."""
    name = re.sub(r"[^\w.-]", "_", os.path.basename(urlsplit(address).path)) or "file"
    return folder / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{name[-80:]}"


def fetch(address: str, path: Path, limit: Limit = OF_ITEMS) -> None:
    """Fetch the file at an address to a path, unless the path exists. A fetch that fails leaves no file.

    Raises:
        ItemError: it cannot be fetched, or passes the limit.
    """
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".fetching-", delete=False) as file:
            try:
                download(address, file, *limit)  # type: ignore[arg-type]  # it is a binary file
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except ReadError as error:
        kinds = {"missing": MissingItemError, "too large": LargeItemError}
        raise kinds.get(error.kind, ItemError)(str(error)) from error
    except OSError as error:
        raise ItemError(
            f"{address!r} cannot be kept in {str(path.parent)!r} ({error.strerror}); make room, or name another folder."
        ) from error


def place_of(path: str | Path, folder: Path | None) -> Path:
    """The path of a data set. The files at an address, or at several that a pattern matches, are fetched first.

    Raises:
        ManifestError: an address without a folder, or one that cannot be fetched.
    """
    text = str(path)
    if not is_address(text):
        return Path(path)
    if folder is None:
        raise ManifestError(
            f"{text!r} is an address, expected a file; download it first, or allow it by naming a folder for what is "
            "downloaded, as `addresses` of a recipe or --addresses."
        )
    try:
        if not has_magic(urlsplit(text).path):
            fetch(text, local(text, folder), OF_ROWS)
            return local(text, folder)
        found = _matches(text)
        if not found:
            raise ManifestError(f"{text!r} matches no file; check the pattern.")
        inside = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        for address in found:
            fetch(address, inside / os.path.basename(urlsplit(address).path), OF_ROWS)
        return inside
    except ItemError as error:
        raise ManifestError(str(error)) from error


def _matches(pattern: str) -> list[str]:
    try:
        import fsspec

        system, there = fsspec.core.url_to_fs(pattern)
        found: list[Any] = system.glob(there)
        return sorted(str(system.unstrip_protocol(each)) for each in found)
    except Exception as error:
        raise ManifestError(f"{pattern!r} cannot be listed ({error}); check the address.") from error
