"""GIF, of which only the first frame is decoded."""

from io import BytesIO

from PIL import GifImagePlugin

from omni.vision.formats.limits import MAX_PARTS, TooManyParts


class Gif(GifImagePlugin.GifImageFile):
    """The first frame of a GIF file.

    The decoder gets no other frame. If the codes of the first end early, it would continue with bytes of the next.
    """

    def _open(self) -> None:
        assert self.fp is not None
        self.fp = BytesIO(_first_frame(self.fp.read()))
        super()._open()


def _first_frame(data: bytes) -> bytes:
    """A GIF file with the header, the first frame, and the block that names its transparent colour."""
    at = 13 + _colours(data[10])
    parts, blocks = [data[:at]], 0
    while True:
        start, kind = at, data[at]
        blocks += 1
        if blocks > MAX_PARTS:
            raise TooManyParts
        if kind == 0x2C:
            at += 10 + _colours(data[at + 9]) + 1
        elif kind == 0x21:
            at += 2
        elif kind != 0:  # a second end of blocks is allowed
            raise OSError("image file is truncated: no frame")
        while length := data[at]:
            at += 1 + length
            blocks += 1
            if blocks > MAX_PARTS:
                raise TooManyParts
        at += 1
        if kind == 0x2C or data[start + 1] == 0xF9:
            parts.append(data[start:at])
        if kind == 0x2C:
            return b"".join([*parts, b";"])


def _colours(flags: int) -> int:
    """Size of the table of colours that follows, in bytes."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
