"""Rewards that other processes import; as a program, a reward that hangs in one of them."""

import os
import re
import sys


def length(prompts, responses, rows):
    """The lengths; "raise", "exit" and "hang" among the responses do what they say."""
    if "raise" in responses:
        raise KeyError("no answer")
    if "exit" in responses:
        os._exit(7)
    if "hang" in responses:
        re.search("(a+)+b", "a" * 50)  # takes 2^50 steps, and lets no other thread run
    return [len(response) for response in responses]


def says_yes(prompts, responses, rows):
    """1 for "yes"."""
    return [response == "yes" for response in responses]


def main():
    """Scores responses in two processes until the time limit; exits with 3 where it is exceeded."""
    import numpy as np
    import tiny

    from rlhf_jax.data import batches
    from rlhf_jax.rewards import combine, host
    from rlhf_jax.sampling.rollout import Rollout
    from rlhf_jax.training.state import TrainingStopped

    reward = combine.in_processes(length, 2)
    host.call(reward, ["p"], ["starts the processes"], [None])
    examples = batches.prompts([{"prompt": "p"}], tiny.TOKENIZER, 4)
    tokens = np.array([list(b"phang"), list(b"pyess"), list(b"pnone")])
    mask = np.array([[0, 1, 1, 1, 1]] * 3)
    fields = dict.fromkeys(Rollout._fields) | {"tokens": tokens, "attend": mask | 1, "mask": mask}
    try:
        host.scores(
            reward, tiny.TOKENIZER, examples, Rollout(**fields), np.zeros(3, int), timeout=1.0
        )
    except TrainingStopped as error:
        print(error)
        sys.exit(3)


if __name__ == "__main__":
    main()
