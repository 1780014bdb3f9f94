"""Programs for people around a training run: label, judge, respond, chat and plot.

Each is a console command (`rlhf-jax-label`, ...), also `python -m rlhf_jax.tools.label`.
"""
