"""Floating tensors to int8 with one scale a row, alone or fused with what makes them."""
