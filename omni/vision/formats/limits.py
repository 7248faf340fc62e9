"""What a file may hold at most, and the errors for files that hold more."""

MAX_PIXELS = 50_000_000
"""Largest width times height, by the header alone: a file of a few kilobytes can claim a size that fills the memory."""

MAX_PARTS = 300_000
"""Most chunks, blocks, segments or strips of a file. Programs write fewer; more would only keep a reader busy."""


class TooLarge(ValueError):
    """A picture has more than `MAX_PIXELS`."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__(f"{width} x {height} = {width * height:,}")


class TooManyParts(ValueError):
    """A file has more than `MAX_PARTS`, or a JPEG file more scans than `omni.vision.formats.jpeg.MAX_SCANS`."""

    def __init__(self, what: str = "") -> None:
        super().__init__(f"more than {what or f'{MAX_PARTS:,} parts'}")
