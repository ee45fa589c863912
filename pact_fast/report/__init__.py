"""The report of a run and the rollout viewer: two self-contained HTML files, and tables for the terminal."""

from pact_fast.report.html import write_report, write_view

__all__ = ["write_report", "write_view"]
