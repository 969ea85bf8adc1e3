"""Images: decoding, bit depth, headers, arrays, damage."""
