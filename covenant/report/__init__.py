"""The report of a run: figures, `report.html`, progress, summary."""
