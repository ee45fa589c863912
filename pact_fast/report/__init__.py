"""The report of a run and the rollout viewer: two HTML files without any outside reference, and tables for the terminal."""

from pact_fast.report.html import write_report, write_view

__all__ = ["write_report", "write_view"]
