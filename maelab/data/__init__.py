"""Data: download and verify (sources), load and split (datasets, folder)."""

from maelab.data.datasets import Dataset, ImageSet, label_fraction, limit, load, split, training_sets
from maelab.data.sources import NAMES, obtain

__all__ = ["NAMES", "Dataset", "ImageSet", "label_fraction", "limit", "load", "obtain", "split", "training_sets"]
