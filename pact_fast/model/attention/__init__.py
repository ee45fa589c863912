"""Tree attention: every token of a packed tree attends to its own path, on CPU and CUDA, with sequence parallelism."""
