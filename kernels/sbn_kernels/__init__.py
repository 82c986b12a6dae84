"""The kernel library of megatron_sbn: imports torch and triton only."""
