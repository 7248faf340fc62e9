"""The formats of pictures, decoded strictly: every pixel that the file should hold, or an error.

Most decoders continue after damage. Missing pixels become grey, black, or old contents of memory, and at best a warning is
printed. Each file here holds a plug-in of Pillow that uses its decoder in a way that makes it report damage: its `load` is
strict.

| format | how lost pixels are noticed                                                                             |
|--------|---------------------------------------------------------------------------------------------------------|
| JPEG   | TurboJPEG turns each warning of libjpeg into an error; a progressive file needs a scan for every bit     |
| PNG    | all chunks that decide pixels have checksums; rows are counted if the last one is empty                  |
| GIF    | the decoder gets the first frame alone; otherwise it would continue with bytes of the next               |
| BMP    | the sizes in the header are compared with the file's                                                     |
| TIFF   | strips must cover the picture; libtiff checks compressed strips first, see `libtiff`                     |
| WebP   | libwebp refuses damaged files by itself                                                                  |

A file whose pixels are whole is read, even if a decoder warns about something else in it. The warning is in `info["note"]`.
"""

import logging
import re
import threading
import warnings
from io import BytesIO

from PIL import Image, ImageFile

from omni.vision.formats.bmp import Bmp
from omni.vision.formats.gif import Gif
from omni.vision.formats.jpeg import Jpeg
from omni.vision.formats.png import Png
from omni.vision.formats.tiff import Tiff
from omni.vision.formats.webp import WebP

logging.getLogger("PIL").addHandler(logging.NullHandler())  # or Pillow would print what the error says already


_FORMATS: tuple[tuple[re.Pattern[bytes], type[ImageFile.ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), Jpeg),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), Png),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), WebP),
    (re.compile(rb"GIF8[79]a"), Gif),
    (re.compile(rb"BM"), Bmp),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), Tiff),
)

_WARNINGS = threading.Lock()


def open_file(data: bytes, plugin: type[ImageFile.ImageFile]) -> ImageFile.ImageFile:
    """An image whose header has been read, and whose pixels have not been decoded.

    Raises:
        Exception: the data are damaged; decoders raise nearly anything.
    """
    if plugin not in (Gif, Tiff):
        return plugin(BytesIO(data))
    # Two plug-ins only warn about damage: about a GIF whose first frame reaches far beyond its canvas, and about a TIFF
    # whose table of tags ends early (it may then lack its orientation). Filters of warnings belong to the whole process,
    # hence the lock.
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("error", r"Truncated|Corrupt|Possibly corrupt|Tag ", UserWarning)
        return plugin(BytesIO(data))


def plugin_of(data: bytes) -> type[ImageFile.ImageFile] | None:
    """The plug-in that reads a file, by its first bytes; None if there is none.

    `Image.open` would try forty formats, some of which start other programs. It would also warn about large pictures before
    omni can check the size.
    """
    return next((plugin for magic, plugin in _FORMATS if magic.match(data)), None)
