"""Batches of arrays in a file: a list of batches, each a list of arrays."""

import numpy as np


def save(path, batches):
    """Writes an `.npz` file with the names <batch>.<position>."""
    np.savez(
        path,
        **{f"{i}.{k}": x for i, flat in enumerate(batches) for k, x in enumerate(flat)},
    )


def load(path):
    """Reads what `save` wrote."""
    batches = {}
    with np.load(path) as file:
        for name in file.files:  # in the order of writing
            batches.setdefault(name.split(".")[0], []).append(file[name])
    return list(batches.values())
