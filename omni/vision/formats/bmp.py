"""BMP, whose sizes are compared with the file's."""

from PIL import BmpImagePlugin

MAX_RUNS = 10_000_000
"""Most pixels of a BMP file with run lengths, which Pillow reads one by one."""


class Bmp(BmpImagePlugin.BmpImageFile):
    """A BMP file that is as long as its header says. If run lengths end early, Pillow fills the rest with colour 0."""

    def _open(self) -> None:
        assert self.fp is not None
        super()._open()
        if self.info.get("compression") in (1, 2):
            if self.width * self.height > MAX_RUNS:
                raise ValueError(f"run lengths of more than {MAX_RUNS:,} pixels")
            self.fp.seek(0)
            file = self.fp.read()
            whole, start, size = (int.from_bytes(file[at : at + 4], "little") for at in (2, 10, 34))
            if len(file) < (start + size if size else whole):
                raise OSError("image file is truncated")
