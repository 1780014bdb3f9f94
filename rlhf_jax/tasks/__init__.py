"""Tasks to train on: synthetic ones whose true objective is known, and real preferences."""
