"""``simo pack``."""

from typing import Literal

from simo_lightning.data import pack_images, verify_packed

POSITIONAL = {"source": None, "dest": "?"}


def run(
    source: str,
    dest: str | None = None,
    format: Literal["arrow"] = "arrow",
    data_dir: str | None = None,
    class_level: int | None = None,
    on_broken: Literal["error", "skip"] = "error",
    shard_size: float = 500.0,
    workers: int | None = None,
    verify: bool = False,
    progress: bool = True,
) -> None:
    """Pack image files into a few large files.

    Args:
        source: Folder of class folders, with or without folders of splits; or a table (.csv or .parquet) with the
            columns path and label. With --verify and no DEST: the packed folder.
        dest: Folder to write. The same command continues one that was stopped.
        format: arrow, a folder that datasets.load_from_disk of Hugging Face opens.
        data_dir: Folder of the relative paths in a table. Default: that of the table.
        class_level: Which folder above an image names its class, as for --data.class_level.
        on_broken: error, a file that is not an image ends the command; skip, it is left out.
        shard_size: Largest size of a file in MB.
        workers: Processes. Default: one per core, at most 16.
        verify: Compare each file with its digest; without DEST do nothing else.
        progress: Show a progress bar.
    """
    if dest is not None:
        try:
            done = pack_images(
                source, dest, format, data_dir, class_level, on_broken, shard_size, workers, progress
            )  # fmt: skip
        except KeyboardInterrupt:
            print("stopped; the same command continues")
            raise
        for note in done.notes:
            print(note)
        rate = "all were there already"
        if done.written:
            rate = f"{done.written:,} in {done.seconds:.1f} s, {done.written / done.seconds:,.0f} images/s"
        print(f"{done.images:,} images in {done.path} ({done.files:,} files, {done.size / 1e6:,.1f} MB; {rate})")
    elif not verify:
        raise ValueError("dest must be given unless a packed folder is verified (--verify)")
    if verify:
        folder = source if dest is None else dest
        files, size = verify_packed(folder, workers, progress)
        print(f"{files:,} files of {size / 1e6:,.1f} MB in {folder} are as they were packed")
