"""The language-model head: log-probs, entropies, losses and their gradients, computed in chunks of rows.

`loss` and `logprob` are the entry points; `chunked` runs a chunk with the GEMMs of `gemm` and the softmax passes of a
backend (`softmax_torch`, `softmax_cpp`, `softmax_triton`, `softmax_bf16`).
"""
