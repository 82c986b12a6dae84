"""megatron_sbn: distributed pretraining of Sparse-BitNet language models (ternary weights, dynamic N:M sparsity)."""

__version__ = "0.1.0"
