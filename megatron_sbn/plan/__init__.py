"""What a recipe will take on a number of devices, before any is asked for: memory, bytes sent, time. Imports no torch."""
