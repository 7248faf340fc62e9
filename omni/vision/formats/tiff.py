"""TIFF, whose strips must be whole and cover the picture."""

from io import BytesIO
from typing import Any

from PIL import ImageOps, TiffImagePlugin

from omni.vision.formats import libtiff
from omni.vision.formats.limits import MAX_PARTS, TooManyParts
from omni.vision.formats.tags import tag_sizes


class Tiff(TiffImagePlugin.TiffImageFile):
    """The first picture of a TIFF file."""

    def _open(self) -> None:
        assert self.fp is not None
        sizes = tag_sizes(self.fp.read())
        if sum(sizes.values()) > self.fp.tell():
            raise OSError("its tags are larger than the file")
        if (
            max(sizes.get(tag, 0) for tag in (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.TILEOFFSETS))
            > 8 * MAX_PARTS
        ):
            raise TooManyParts
        self.fp.seek(0)
        super()._open()

    def load(self) -> Any:
        """Decode.

        Raises:
            OSError: libtiff reports damage, or the strips do not cover the picture, so that the rest would be black.
        """
        if self.tile and self.use_load_libtiff:
            assert isinstance(self.fp, BytesIO)
            libtiff.check(self.fp.getvalue(), self.tag_v2[TiffImagePlugin.IMAGEWIDTH] if self.mode == "1" else 0)
        elif self.tile:
            width, height = self.tag_v2[TiffImagePlugin.IMAGEWIDTH], self.tag_v2[TiffImagePlugin.IMAGELENGTH]
            layers = len(self.getbands()) if self.tag_v2.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2 else 1
            extents = [tile.extents or (0, 0, 0, 0) for tile in self.tile]
            if sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in extents) < width * height * layers:
                raise OSError("image file is truncated: strips are missing")
        return super().load()

    def load_end(self) -> None:
        """Turn the picture upright. Pillow would read more tables of tags here, whose sizes nobody has checked."""
        ImageOps.exif_transpose(self, in_place=True)
