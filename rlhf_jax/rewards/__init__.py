"""Rewards: anything that gives prompts and responses a number."""
