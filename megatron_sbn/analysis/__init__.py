"""Finished runs side by side: comparisons, the report of a study, its figures. Imports no torch."""
