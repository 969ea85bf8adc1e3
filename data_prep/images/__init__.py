"""Images: checking, decoding, headers, bit depth, arrays, damage, encoding."""
