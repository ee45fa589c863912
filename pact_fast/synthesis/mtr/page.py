"""The HTML report of a folder of tasks: one file, no script, nothing fetched. All texts are escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from pact_fast.files import OTHER_FILE_CURE, write_text
from pact_fast.synthesis.mtr.tool_maker import REASONS as TOOL_REASONS
from pact_fast.synthesis.mtr.verify import REASONS

SHOWN_TOOLS = 60


def write_page(path: Path, manifest: dict[str, Any], tools: dict[str, Any], example: dict[str, Any] | None) -> None:
    """Write the report.

    Args:
        path: The file.
        manifest: Counts of rows and reasons.
        tools: The table of tools.
        example: A task as JSON, whose trace is shown; None: there is none.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html").render(
        manifest=manifest,
        tools=tools,
        shown=tools["tools"][:SHOWN_TOOLS],
        most=max((tool["tasks"] for tool in tools["tools"]), default=1),
        example=example,
        meaning={**REASONS, "unreadable": "no reader accepts the row"},
        tool_meaning=TOOL_REASONS,
    )
    write_text(path, page, OTHER_FILE_CURE)
