"""Checkpoints that open at any layout: what they hold, how they are written, found, verified and read."""
