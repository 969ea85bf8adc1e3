"""From encoded samples to model input: decode, crop, augment, mix."""
