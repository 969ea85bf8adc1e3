"""Compression methods of zip members that are read: deflate, bzip2 and LZMA."""

import bz2
import lzma
import struct
import zipfile
import zlib

METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA})
"""Methods of members that are read."""

_LZMA_HEADER = 9
_LZMA_PROPERTIES = 5
_LEAST_DICTIONARY = 4096


class MemberDataError(ValueError):
    """The compressed data of a member is damaged."""


class MemberDecoder:
    """Decompresses the data of a member, given in pieces, without ever exceeding a length.

    Args:
        method: compression method, one of `METHODS` other than stored.
        size: declared length of the member in bytes.
    """

    def __init__(self, method: int, size: int) -> None:
        self._size = size
        self._head = b""
        self._decoder: zlib._Decompress | bz2.BZ2Decompressor | lzma.LZMADecompressor | None = None
        if method == zipfile.ZIP_DEFLATED:
            self._decoder = zlib.decompressobj(-zlib.MAX_WBITS)
        elif method == zipfile.ZIP_BZIP2:
            self._decoder = bz2.BZ2Decompressor()
        else:
            assert method == zipfile.ZIP_LZMA, method

    @property
    def eof(self) -> bool:
        """Whether the compressed data said that it ends."""
        return self._decoder is not None and self._decoder.eof

    @property
    def needs_input(self) -> bool:
        """Whether there is no more output without more data."""
        if isinstance(self._decoder, bz2.BZ2Decompressor | lzma.LZMADecompressor):
            return self._decoder.needs_input
        return self._decoder is None or not self._decoder.unconsumed_tail

    def decompress(self, data: bytes, length: int) -> bytes:
        """Return the next bytes of the member, at most `length`.

        Args:
            data: the next compressed bytes; empty if there is output left (see `needs_input`).
            length: maximum number of bytes to return.

        Raises:
            MemberDataError: the data is damaged.
        """
        try:
            if self._decoder is None:
                self._head += data
                if len(self._head) < _LZMA_HEADER:
                    return b""
                self._decoder, data = self._open_lzma(), self._head[_LZMA_HEADER:]
            if isinstance(self._decoder, bz2.BZ2Decompressor | lzma.LZMADecompressor):
                return self._decoder.decompress(data, length)
            return self._decoder.decompress(self._decoder.unconsumed_tail + data, length)
        except (zlib.error, lzma.LZMAError, OSError, ValueError):
            raise MemberDataError("its compressed data is damaged") from None

    def _open_lzma(self) -> lzma.LZMADecompressor:
        """Return a decoder with the properties that stand before the data."""
        _, count, properties, dictionary = struct.unpack("<HHBI", self._head[:_LZMA_HEADER])
        if count != _LZMA_PROPERTIES:
            raise lzma.LZMAError
        rest, literal_context = divmod(properties, 9)
        position, literal_position = divmod(rest, 5)
        options = {
            "id": lzma.FILTER_LZMA1,
            # Nothing refers to more than the member's own bytes, whatever the header asks for.
            "dict_size": min(dictionary, max(self._size, _LEAST_DICTIONARY)),
            "lc": literal_context,
            "lp": literal_position,
            "pb": position,
        }
        return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[options])
