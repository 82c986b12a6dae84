"""The Triton backend: its linear layer, forms of the forward GEMM, loss."""
