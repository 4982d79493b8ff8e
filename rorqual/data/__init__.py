"""Corpora: from documents to tokens on disk, and from there to batches that are a function of seed and step."""

from rorqual.data.batches import Ahead, Batch, Mixture
from rorqual.data.build import Options, build, fingerprint
from rorqual.data.checking import Checking
from rorqual.data.errors import DataError
from rorqual.data.reshape import Shape
from rorqual.data.shards import HELD, TRAIN, Corpus, Manifest
from rorqual.data.sources import Reading

__all__ = [
    "HELD",
    "TRAIN",
    "Ahead",
    "Batch",
    "Checking",
    "Corpus",
    "DataError",
    "Manifest",
    "Mixture",
    "Options",
    "Reading",
    "Shape",
    "build",
    "fingerprint",
]
