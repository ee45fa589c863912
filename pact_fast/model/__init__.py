"""Hugging Face decoders on token trees: building, tokenizer, forward passes, fused layers, LoRA, and weight files.

`attention/` computes attention over a packed tree; everything above the decoder is in `kernels/`.
"""
