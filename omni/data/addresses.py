"""Files at addresses, such as "https://...", "s3://..." or "hf://...": fetched once, by fsspec, into a folder.

Nothing is fetched unless the user names that folder. What is in it is not fetched again; remove it to have it anew.
"""

import hashlib
import os
import re
import tempfile
from glob import has_magic
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omni.data.rows import is_address
from omni.data.sources import ManifestError
from omni.modality import ItemError, MissingItemError


def local(address: str, folder: Path) -> Path:
    """Where the file of an address is kept in a folder."""
    name = re.sub(r"[^\w.-]", "_", os.path.basename(urlsplit(address).path)) or "file"
    return folder / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{name[-80:]}"


def fetch(address: str, path: Path) -> None:
    """Bring what is at an address to a path, if nothing is there; all of it or nothing.

    Raises:
        ItemError: it cannot be fetched.
    """
    if path.exists():
        return
    try:
        import fsspec

        path.parent.mkdir(parents=True, exist_ok=True)
        system, there = fsspec.core.url_to_fs(address)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".fetching-", delete=False) as file:
            try:
                file.close()
                system.get_file(there, file.name)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except Exception as error:  # each file system has its own
        kind = MissingItemError if isinstance(error, FileNotFoundError) else ItemError
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise kind(f"{address!r} cannot be fetched ({reason}), expected a file; check the address.") from error


def place_of(path: str | Path, folder: Path | None) -> Path:
    """The path of a data set; of an address, or of several that a pattern matches, where they are kept once fetched.

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
            fetch(text, local(text, folder))
            return local(text, folder)
        found = _matches(text)
        if not found:
            raise ManifestError(f"{text!r} matches no file; check the pattern.")
        inside = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        for address in found:
            fetch(address, inside / os.path.basename(urlsplit(address).path))
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
