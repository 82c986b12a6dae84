"""What a run leaves behind: its folder and the files in it, read and written. Imports no torch."""
