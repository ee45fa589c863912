"""Parameter ownership during training: every rank holds everything (`replicated`), or DeepSpeed ZeRO shards it (`zero`)."""
