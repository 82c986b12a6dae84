"""Codes in fewer bits: 2-bit and planes, 2:4, base 3; masks in one bit."""
