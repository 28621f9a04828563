"""The comparison: architectures trained alike on one data set, ranked and shown."""

from keras_edifice.comparison.contest import Comparison, Row, compare
from keras_edifice.comparison.data import Data, load_data

__all__ = ["Comparison", "Data", "Row", "compare", "load_data"]
