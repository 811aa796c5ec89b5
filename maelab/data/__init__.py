"""Data: download and verify (sources), load and split (datasets, splits, folder)."""

from maelab.data.datasets import label_fraction, limit, load, reading_of, split, training_sets
from maelab.data.sets import Dataset, ImageSet
from maelab.data.sources import NAMES, obtain
from maelab.data.splits import compare_images

__all__ = [
    "NAMES",
    "Dataset",
    "ImageSet",
    "compare_images",
    "label_fraction",
    "limit",
    "load",
    "obtain",
    "reading_of",
    "split",
    "training_sets",
]
