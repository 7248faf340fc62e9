"""The command `omni`. A subcommand reads its arguments, calls one function of the library and prints what it returns.

Heavy modules are imported inside of the commands, so that `omni --help` and shell completion answer at once. A mistake of
the user becomes one sentence on stderr and exit status 2. Each command names the errors that are the user's, so a bug in
omni still shows its traceback. Errors of the operating system, such as a full disk, become a sentence here.
"""

import os
import sys

from omni.cli import (
    asking,
    benching,
    checkpoint,
    embedding,
    evaluating,
    exchange,
    looking,
    plugins,
    serving,
    teaching,
    training,
)
from omni.cli.commands import app

__all__ = [
    "app",
    "asking",
    "benching",
    "checkpoint",
    "embedding",
    "evaluating",
    "exchange",
    "looking",
    "main",
    "plugins",
    "serving",
    "teaching",
    "training",
]


def main() -> None:
    """Run the command; the entry point of the installed package."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output has stopped, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f" of {str(error.filename)!r}" if error.filename else ""
        sys.stderr.write(f"Error: the system says {error.strerror or str(error)!r}{where}; nothing more was done.\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
