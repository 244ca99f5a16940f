"""An HTML page that shows the embeddings of a checkpoint, and one that compares such reports."""

from simo_lightning.report.collector import EmbeddingCollector
from simo_lightning.report.compare import write_comparison
from simo_lightning.report.contents import Contents, Section, Table, make_contents
from simo_lightning.report.gallery import Shot, Strip
from simo_lightning.report.page import write_page
from simo_lightning.report.pictures import EmbeddedImages, Picture
from simo_lightning.report.record import Record, load_record
from simo_lightning.report.rows import MetricGroup, MetricRow, metric_groups, metric_rows
from simo_lightning.report.thumbnails import Sprite
from simo_lightning.report.write import write_report

__all__ = [
    "Contents",
    "EmbeddedImages",
    "EmbeddingCollector",
    "MetricGroup",
    "MetricRow",
    "Picture",
    "Record",
    "Section",
    "Shot",
    "Sprite",
    "Strip",
    "Table",
    "load_record",
    "make_contents",
    "metric_groups",
    "metric_rows",
    "write_comparison",
    "write_page",
    "write_report",
]
