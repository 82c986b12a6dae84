"""What is measured in the model while it trains: masks, zeros, flips, the shape of the weights."""
