"""WebP, of which libwebp itself refuses damaged files."""

from PIL import WebPImagePlugin

from omni.vision.formats.limits import MAX_PIXELS, TooLarge


class WebP(WebPImagePlugin.WebPImageFile):
    """A WebP file. The size of its canvas is read first, because Pillow takes memory for two before it tells the size."""

    def _open(self) -> None:
        assert self.fp is not None
        header = self.fp.read(30)
        width, height = (1 + int.from_bytes(header[at : at + 3], "little") for at in (24, 27))
        if header[12:16] == b"VP8X" and width * height > MAX_PIXELS:
            raise TooLarge(width, height)
        self.fp.seek(0)
        super()._open()
