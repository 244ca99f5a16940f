"""Nearest neighbours among embeddings: exact or approximate, by embeddings or by image files."""

from simo_lightning.search.images import Match, SearchResult, search_images
from simo_lightning.search.neighbors import NearestNeighbors, Neighbors
from simo_lightning.search.page import write_page

__all__ = ["Match", "NearestNeighbors", "Neighbors", "SearchResult", "search_images", "write_page"]
