"""GEMMs of int8 activations and ternary weights, forward and backward."""
