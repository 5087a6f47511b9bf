"""Compact layers: modules whose trainable parameter is a part of their weight."""

# Each enters its type into the registry.
from . import projected_linear as projected_linear
from . import selected_embedding as selected_embedding
from . import transposed_linear as transposed_linear
