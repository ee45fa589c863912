"""Reports: report.html of a run and the rollout viewer, self-contained HTML files, and tables for the terminal.

run_data.py      reads a run directory, complete or not
before_after.py  success before and after training, with intervals
charts.py        curves of metrics as SVG; SPECS lists them
html.py          writes the pages from page.html
console.py       tables for the terminal
"""

from pact_fast.report.html import write_report, write_view

__all__ = ["write_report", "write_view"]
