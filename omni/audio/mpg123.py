"""What libmpg123 says while it decodes an MP3 file.

libsndfile passes none of it on: libmpg123 writes to the error output of the process that a part of the sound cannot be
decoded, leaves it silent, and goes on. So its words are caught there.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile
from threading import Lock

_ITS_OWN = re.compile(rb"\[\S*mpg123|Note: |Warning: ")
_lock = Lock()


class Words(list[str]):
    """Lines that libmpg123 said."""

    @property
    def complaints(self) -> list[str]:
        """Those that are about samples; the others are about tags and sizes."""
        return [line for line in self if not line.startswith("Warning: ")]


@contextmanager
def heard() -> Iterator[Words]:
    """Inside, what libmpg123 says is caught; the list is filled at the end. What others say there is passed on then."""
    words = Words()
    with _lock, TemporaryFile() as file:
        error_output = None
        with suppress(OSError):  # it is closed
            error_output = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield words
        finally:
            if error_output is None:
                os.close(2)
            else:
                os.dup2(error_output, 2)
            file.seek(0)
            lines = file.read().splitlines(keepends=True)
            words += [line.decode("ascii", "replace").strip() for line in lines if _ITS_OWN.match(line)]
            if error_output is not None:
                with suppress(OSError):
                    os.write(error_output, b"".join(line for line in lines if not _ITS_OWN.match(line)))
                os.close(error_output)
