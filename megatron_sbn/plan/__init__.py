"""What a recipe will take on some devices: memory, communication volume, time. Imports no torch."""
