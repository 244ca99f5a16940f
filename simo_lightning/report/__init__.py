"""An HTML page that shows the embeddings of a checkpoint."""

from simo_lightning.report.collector import EmbeddingCollector
from simo_lightning.report.page import Section, write_page
from simo_lightning.report.pictures import EmbeddedImages, Picture, draw_sections
from simo_lightning.report.rows import MetricRow, metric_rows
from simo_lightning.report.write import write_report

__all__ = [
    "EmbeddedImages",
    "EmbeddingCollector",
    "MetricRow",
    "Picture",
    "Section",
    "draw_sections",
    "metric_rows",
    "write_page",
    "write_report",
]
