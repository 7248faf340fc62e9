"""The messages that libmpg123 prints while it decodes an MP3 file.

If libmpg123 cannot decode a part of a sound, it prints a message to the standard error of the process, leaves the part
silent, and continues. libsndfile does not report this. So the messages are captured from the standard error.
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
    """The lines that libmpg123 has printed."""

    @property
    def complaints(self) -> list[str]:
        """The lines about samples. Warnings are about tags and sizes."""
        return [line for line in self if not line.startswith("Warning: ")]


@contextmanager
def heard() -> Iterator[Words]:
    """Inside, capture the lines of libmpg123. At the end the list is filled, and all other lines are printed."""
    words = Words()
    with _lock, TemporaryFile() as file:
        error_output = None
        with suppress(OSError):  # standard error may be closed
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
