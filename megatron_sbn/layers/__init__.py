"""What a model is made of: linear layers, norm, attention, and the spec that tells Megatron-Core about them."""
