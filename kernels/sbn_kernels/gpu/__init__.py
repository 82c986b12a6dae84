"""The Triton backend: its products, forms of the forward product, loss."""
