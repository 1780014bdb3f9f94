"""Tasks to train on: a synthetic one whose true objective is known, and real preferences."""
