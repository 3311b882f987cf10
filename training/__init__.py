"""Training and measuring purifiers; run from a checkout as ``python -m training``."""
