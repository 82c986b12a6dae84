"""What a recipe will take on some devices, before any is asked for: memory, bytes sent, time. Imports no torch."""
