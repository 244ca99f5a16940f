"""Search with image files as queries, in the file that ``simo embed`` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from simo_lightning.embedder import Embedder
from simo_lightning.embeddings_file import EmbeddingsFile, open_embeddings, sha256_of
from simo_lightning.search.neighbors import Approximate, NearestNeighbors


class Match(NamedTuple):
    """A neighbour of a query.

    Attributes:
        path: As in the index.
        cosine: With the query.
        row: In the index, from 0.
        class_name: Nearest class mean; None if the index has none.
    """

    path: str
    cosine: float
    row: int
    class_name: str | None


class SearchResult(NamedTuple):
    """The neighbours of one query, nearest first."""

    query: str
    matches: list[Match]


def search_images(
    index: str | Path,
    queries: Sequence[str | Path],
    k: int = 5,
    checkpoint: str | Path | None = None,
    device: str = "auto",
    approximate: Approximate | None = None,
) -> tuple[list[SearchResult], float | None]:
    """Find the images of an index that are most similar to query images.

    Args:
        index: File that ``simo embed`` wrote.
        queries: Image files.
        k: Neighbours of each.
        checkpoint: That made the index, by its SHA-256 digest. None: where the index says, or beside the index.
        device: As in :class:`~simo_lightning.embedder.Embedder`.
        approximate: As in :class:`NearestNeighbors`.

    Returns:
        The neighbours of each query, and the recall of an approximate search against the exact one on 200 images of the
        index; None for an exact search.

    Raises:
        FileNotFoundError: If a file is missing.
        ModuleNotFoundError: If an extra is missing that the index or an approximate search needs.
        OSError: If a query cannot be read.
        ValueError: If the index has no paths or does not name its checkpoint, the checkpoint is another one, k is out
            of range, or a query is not an image.
    """
    with open_embeddings(index) as file:
        if "path" not in file.columns:
            raise ValueError(f"index {str(index)!r} must have a column path, got {', '.join(file.columns)}")
        if not 1 <= k <= file.rows:  # before the model is loaded
            raise ValueError(f"k must be in 1..{file.rows}, the number of images in the index, got {k}")
        embedder = Embedder.load(
            find_checkpoint(file, checkpoint), device=device, precision=file.info.get("precision", "32")
        )
        neighbors = NearestNeighbors(file, approximate=approximate)
        cosines, rows = neighbors.search(embedder(list(queries)), k)
        kept = sorted({row for row in rows.flatten().tolist() if row >= 0})
        paths = dict(zip(kept, file.column("path", kept), strict=True))
        names = dict(zip(kept, file.column("class", kept), strict=True)) if "class" in file.columns else {}
        results = [
            SearchResult(
                str(query),
                [
                    Match(paths[row], cosine, row, names.get(row))
                    for cosine, row in zip(cosines[number].tolist(), rows[number].tolist(), strict=True)
                    if row >= 0
                ],
            )
            for number, query in enumerate(queries)
        ]
        return results, None if approximate is None else neighbors.recall(k)


def find_checkpoint(index: EmbeddingsFile, checkpoint: str | Path | None = None) -> Path:
    """The checkpoint that made an index.

    Args:
        index: The open index.
        checkpoint: File; None: where the index says, or of the same name beside the index.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is another one, or the index does not say which.
    """
    name, digest = index.info.get("checkpoint"), index.info.get("checkpoint_sha256")
    if not isinstance(name, str) or not isinstance(digest, str):
        raise ValueError(f"index {str(index.path)!r} must say which checkpoint made it, as simo embed writes it")
    tried = [Path(name), index.path.parent / Path(name).name] if checkpoint is None else [Path(checkpoint).expanduser()]
    found = [path for path in tried if path.is_file()]
    if not found:
        raise FileNotFoundError(
            f"no checkpoint {' nor '.join(repr(str(path)) for path in dict.fromkeys(tried))}"
            + (": pass the one that made the index, --checkpoint FILE" if checkpoint is None else "")
        )
    for path in found:
        if sha256_of(path) == digest:
            return path
    raise ValueError(
        f"checkpoint {str(found[0])!r} is not the one that made the index {str(index.path)!r} (its SHA-256 digest must "
        f"begin with {digest[:12]}, got {sha256_of(found[0])[:12]})"
    )
