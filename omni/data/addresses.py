"""Files at addresses, such as "https://...", "s3://..." or "hf://...": fetched once, by fsspec, into a folder.

Nothing is fetched unless the user names that folder, and nothing from private networks unless the user allows them, too. A
file in the folder is not fetched again; remove it to fetch it once more.
"""

import hashlib
import os
import re
import tempfile
from glob import has_magic
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from omni.data.sources import ManifestError, is_address
from omni.downloads import download, matches
from omni.files import ReadError
from omni.items import MAX_BYTES, said_of_item
from omni.modality import ItemError


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


def fetch(address: str, path: Path, limit: Limit = OF_ITEMS, allow_private: bool = False) -> None:
    """Fetch the file at an address to a path, unless the path exists. A fetch that fails leaves no file.

    Raises:
        ItemError: it cannot be fetched, passes the limit, or is not public; see `download`.
    """
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".fetching-", delete=False) as file:
            try:
                download(address, file, *limit, allow_private)  # type: ignore[arg-type]  # it is a binary file
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except ReadError as error:
        raise said_of_item(error) from error
    except OSError as error:
        raise ItemError(
            f"{address!r} cannot be kept in {str(path.parent)!r} ({error.strerror}); make room, or name another folder."
        ) from error


def place_of(path: str | Path, folder: Path | None, allow_private: bool = False) -> Path:
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
            fetch(text, local(text, folder), OF_ROWS, allow_private)
            return local(text, folder)
        found = matches(text, allow_private)
        if not found:
            raise ManifestError(f"{text!r} matches no file; check the pattern.")
        inside = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        for address in found:
            fetch(address, inside / os.path.basename(urlsplit(address).path), OF_ROWS, allow_private)
        return inside
    except (ItemError, ReadError) as error:
        raise ManifestError(str(error)) from error
