"""What goes wrong with data."""


class DataError(ValueError):
    """Shards or images that cannot be used; the text says which, why and what to do."""
