"""``simo search``."""

from collections.abc import Sequence
from typing import Literal

from simo_lightning.embed_files import find_images
from simo_lightning.search import SearchResult, search_images, write_page

POSITIONAL = {"index": None, "queries": "+"}


def run(
    index: str,
    queries: list[str],
    k: int = 5,
    checkpoint: str | None = None,
    html: str | None = None,
    approximate: Literal["hnsw", "ivf"] | None = None,
    device: str = "auto",
) -> None:
    """Find nearest images.

    Args:
        index: File that simo embed wrote.
        queries: Image files, folders or patterns in quotes.
        k: Neighbours of each query.
        checkpoint: The checkpoint that made the index. Default: where it was then, or beside the index.
        html: Write an HTML file with thumbnails.
        approximate: Search a graph (hnsw) or an inverted file (ivf) of faiss instead of comparing every embedding, and
            print the recall. Both are built at every start, so they save time only for thousands of queries.
        device: That embeds the queries: auto, cpu, cuda, ...
    """
    results, recall = search_images(index, list(find_images(queries)), k, checkpoint, device, approximate)
    for result in results:
        print("\n".join(table(result)))
    if recall is not None:
        print(f"recall@{k} of {approximate}: {recall:.4f} of the exact neighbours, on at most 200 images of the index")
    if html is not None:
        write_page(html, results, index)
        print(f"pictures in {html}")


def table(result: SearchResult) -> Sequence[str]:
    """The neighbours of a query as lines of text."""
    width = max([len(match.class_name or "") for match in result.matches], default=0)
    lines = [result.query]
    for number, match in enumerate(result.matches, 1):
        name = f"{match.class_name:{width}}  " if match.class_name is not None else ""
        lines.append(f"{number:4}  {match.cosine:7.4f}  {name}{match.path}")
    return [line.encode("utf-8", "backslashreplace").decode() for line in lines]
