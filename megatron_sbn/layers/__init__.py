"""What a model is made of: linear layers, norm, attention, and the specification that tells Megatron-Core about them."""
