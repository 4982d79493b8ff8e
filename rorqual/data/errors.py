"""What is wrong with data."""


class DataError(ValueError):
    """A source, shard or manifest that can't be used as it is; the message says what to do."""
