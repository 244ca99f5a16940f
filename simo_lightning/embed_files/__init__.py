"""Embeddings of any number of image files, written to a Parquet or .npz file."""

from simo_lightning.embed_files.classes import read_classes
from simo_lightning.embed_files.listing import find_images
from simo_lightning.embed_files.run import EmbeddedFiles, embed_files

__all__ = ["EmbeddedFiles", "embed_files", "find_images", "read_classes"]
