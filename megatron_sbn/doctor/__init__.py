"""`sbn doctor`: what can be said about a recipe and its layout before a job is paid for."""
