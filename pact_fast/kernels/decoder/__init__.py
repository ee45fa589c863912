"""Decoder kernels on CPU: RMSNorm, rotary embeddings, silu(gate)·up and the gated MLP, as autograd functions."""
