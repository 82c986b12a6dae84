"""Products of few tokens with packed weights."""
