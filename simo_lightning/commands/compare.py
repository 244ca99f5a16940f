"""``simo compare``."""

from simo_lightning.report.compare import write_comparison

POSITIONAL: dict[str, str | None] = {"runs": "+"}


def run(runs: list[str], out: str = "compare.html") -> None:
    """Show the reports of two or more runs side by side in one HTML file.

    Args:
        runs: Folders of runs that have a report (``simo plot``), or folders of reports, at least two.
        out: File to write.
    """
    print(f"comparison  {write_comparison(runs, out)}")
