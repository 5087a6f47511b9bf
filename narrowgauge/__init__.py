"""narrowgauge: a training system for large language models with compact gradients and activation offload.

The subpackages are the folders of the same names beside this one; the links here make them importable from a clone.
"""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("narrowgauge")
except PackageNotFoundError:  # a clone that was not installed
    __version__ = "0+unknown"
