"""Hugging Face decoders run on token trees: building, tokenizer, forward passes, fused layers, LoRA, and weights on disk.

`attention/` computes attention over a packed tree; everything above the decoder is in `kernels/`.
"""
