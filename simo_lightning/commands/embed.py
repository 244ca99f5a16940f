"""``simo embed``."""

from typing import Literal

from simo_lightning.embed_files import embed_files

POSITIONAL = {"checkpoint": None, "images": "+"}


def run(
    checkpoint: str,
    images: list[str],
    out: str,
    classes: str | None = None,
    scores: bool = False,
    shares: bool = False,
    data_dir: str | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str = "auto",
    precision: Literal["32", "bf16"] = "32",
    devices: int = 1,
    progress: bool = True,
) -> None:
    """Embed image files.

    Args:
        checkpoint: Checkpoint of a trained model.
        images: Image files, folders, patterns in quotes such as "DIR/*/front*.jpg", and tables (.csv or .parquet) with
            a column "path". No labels are needed.
        out: File of the embeddings, .parquet or .npz. The same command continues one that was stopped.
        classes: Class folders of images, or a file of labelled embeddings, whose class means replace those of the
            checkpoint.
        scores: Write the cosine with every class mean, not only the largest.
        shares: Write the share of every class in the embedding's energy and the rest.
        data_dir: Folder of the relative paths in a table. Default: that of the table.
        batch_size: Images that are embedded at a time.
        num_workers: Processes that read images, for each device. Default: one per core.
        device: auto, cpu, cuda, cuda:1, ...
        precision: bf16 is faster on a GPU.
        devices: Number of GPUs, or of processes that share the cores of the CPU.
        progress: Show a progress bar.
    """
    try:
        done = embed_files(
            checkpoint, images, out, classes, scores, shares, data_dir, batch_size, num_workers, device, precision,
            devices, progress,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("stopped; the same command continues")
        raise
    for note in done.notes:
        print(note)
    if done.broken:
        print(f"{done.broken:,} images could not be read: {done.path}.broken.csv")
    if done.embedded:
        rate = f"{done.embedded:,} in {done.seconds:.1f} s, {done.embedded / done.seconds:,.0f} images/s"
    else:
        rate = "all were there already"
    print(f"{done.images:,} embeddings in {done.path} ({rate})")
