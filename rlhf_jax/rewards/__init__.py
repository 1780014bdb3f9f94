"""Rewards: learned models, functions in Python, and how well scores agree with rankings."""
