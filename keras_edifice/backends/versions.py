"""Which version of a package is installed, found out without importing it."""

import functools
import importlib.metadata
import importlib.util


@functools.cache
def _distributions():
    return importlib.metadata.packages_distributions()


def version(package: str) -> str | None:
    """The version of the distribution that holds `package`; None if not installed."""
    if importlib.util.find_spec(package) is None:
        return None
    for distribution in _distributions().get(package, [package]):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
