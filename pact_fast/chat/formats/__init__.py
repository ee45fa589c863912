"""Tool-call formats, one file each: how an assistant turn with calls is written, and how one that a model wrote is read."""
