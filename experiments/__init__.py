"""Claims of the papers, tried at a size that one GPU trains in minutes: `python -m experiments`."""
