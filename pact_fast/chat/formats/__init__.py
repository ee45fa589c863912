"""Tool-call formats, one file each: how calls are written in an assistant turn, and how they are parsed."""
