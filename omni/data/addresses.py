"""Files at addresses, such as "https://...", "s3://..." or "hf://...": fetched once, by fsspec, into a folder.

Python itself reads the web, because fsspec would need another package for it.

Nothing is fetched unless the user names that folder. A file in it is not fetched again; remove it to fetch it once more.
"""

import hashlib
import os
import re
import shutil
import tempfile
from glob import has_magic
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from omni.data.sources import ManifestError, is_address
from omni.modality import ItemError, MissingItemError

SECONDS = 60
"""A server that says nothing for so long has failed."""


def local(address: str, folder: Path) -> Path:
    """Where the file of an address is kept in a folder."""
    name = re.sub(r"[^\w.-]", "_", os.path.basename(urlsplit(address).path)) or "file"
    return folder / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{name[-80:]}"


def fetch(address: str, path: Path) -> None:
    """Fetch the file at an address to a path, unless the path exists. A fetch that fails leaves no file.

    Raises:
        ItemError: it cannot be fetched.
    """
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".fetching-", delete=False) as file:
            try:
                file.close()
                _download(address, file.name)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except Exception as error:  # each file system has its own
        kind = MissingItemError if isinstance(error, FileNotFoundError) else ItemError
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise kind(f"{address!r} cannot be fetched ({reason}), expected a file; check the address.") from error


def _download(address: str, to: str) -> None:
    if address.lower().startswith(("http://", "https://")):
        asked = Request(address, headers={"User-Agent": "omni"})
        with urlopen(asked, timeout=SECONDS) as found, open(to, "wb") as file:
            shutil.copyfileobj(found, file)
            whole = found.headers.get("Content-Length")
            if whole is not None and file.tell() != int(whole):
                raise OSError(f"{file.tell():,} bytes of {whole} came")
        return
    import fsspec

    system, there = fsspec.core.url_to_fs(address)
    system.get_file(there, to)


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
