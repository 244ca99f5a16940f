"""Image data of any size as litdata's chunks, streamed from an object store in balanced batches."""

from simo_lightning.streaming.datamodule import StreamPairDataModule
from simo_lightning.streaming.images import Stream, StreamImages, open_stream, verify_stream
from simo_lightning.streaming.sampler import StreamSampler
from simo_lightning.streaming.write import Record, write_stream

__all__ = [
    "Record",
    "Stream",
    "StreamImages",
    "StreamPairDataModule",
    "StreamSampler",
    "open_stream",
    "verify_stream",
    "write_stream",
]
