"""Training batches in numpy: token trees, prefix merging, packing, FLOP counts and the loss table.

Nothing here imports torch or transformers: batches can be built, inspected and tested without a model.
"""
