"""Tables of tags, in TIFF files and in EXIF data."""

import struct
from contextlib import suppress

_UNITS = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Size of a value in bytes, for each type of more than one byte."""


def tag_sizes(data: bytes) -> dict[int, int]:
    """The size of each tag in the first table of a TIFF file, in bytes. EXIF data begin with such a table, too.

    Tags may share bytes. A reader of the whole table may hold the whole file in memory for each tag, up to 65,535 times.
    """
    order, big = "<" if data[:1] == b"I" else ">", b"+" in data[2:4]
    sizes: dict[int, int] = {}
    with suppress(struct.error):  # the table ends early; the plug-in reports it
        (at,) = struct.unpack_from(order + ("8xQ" if big else "4xI"), data)
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
        entry = struct.Struct(order + ("HHQ8x" if big else "HHI4x"))
        for number in range(count):
            tag, kind, values = entry.unpack_from(data, at + (8 if big else 2) + number * entry.size)
            sizes[tag] = sizes.get(tag, 0) + values * _UNITS.get(kind, 1)
    return sizes
