"""The defences that the paper compares itself with, run in the same harness."""
