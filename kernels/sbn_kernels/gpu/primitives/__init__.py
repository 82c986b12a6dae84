"""What kernels share: tiles, launches, rounding, transposition."""
