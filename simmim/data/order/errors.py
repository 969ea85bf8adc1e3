"""What goes wrong with data."""


class DataError(ValueError):
    """Shards or images that cannot be used; the text says which, why and what to do."""


class BadSampleError(DataError):
    """One sample is damaged, too large or not what was asked for; those around it may be good."""
