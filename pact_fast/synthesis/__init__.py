"""Programs that make tasks and expert traces."""
