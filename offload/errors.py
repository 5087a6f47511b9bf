"""What can go wrong with stored activations. Whatever happens, a gradient is never computed from wrong bytes."""


class OffloadError(RuntimeError):
    """Base of the errors below."""


class OffloadIOError(OffloadError):
    """A stored activation could not be read back, or a device did not answer in time."""


class OffloadCorruptionError(OffloadError):
    """What was read back is not what was written: its checksum differs."""


class OffloadSpaceError(OffloadError):
    """The path has less room than the slab needs."""
