"""The language-model head: log-probs, entropies, losses and their gradients, computed in chunks of rows.

`loss`, `logprob` and `cross_entropy` are the entry points, `tokens` is the loss table; `chunked` runs a chunk with the
GEMMs of `gemm` and the softmax passes of a backend (`softmax_torch`, `softmax_cpp`, `softmax_triton`, `softmax_bf16`).
"""
