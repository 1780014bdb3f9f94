"""PPO on real input: a pretrained story teller learns to tell happier stories.

    python experiments/stories_sentiment.py --data DIR

DIR (or RLHF_JAX_DATA) holds `models/stories260K` (a Llama of 260,032 parameters, A. Karpathy's
tinyllamas), `stories/tinystories_sample.jsonl.gz` (TinyStories) and `lexicon/vader_lexicon.txt`
(VADER). The policy is the pretrained model, a prompt is how a real story begins. Gold is the sum of
the valences that VADER's lexicon gives to the words of the continuation, s / sqrt(s^2 + 15). The
reward model never sees it: it is trained on pairs of the policy's own samples, labelled by gold
with Bradley-Terry noise. The stories must stay stories: the summary holds the cross entropy of
the continuations under the untouched model and their share of distinct bigrams, before and after.

Result, 2 cores of an Intel Xeon, 2026-11-23, 357 held-out openings continued 16 times each.
Seed 0 took 7.5 minutes; seeds 1 and 2 ran before a reordering of the model's arithmetic, which
moved seed 0 in the third digit:

    seed                                           0               1               2
    untouched model on real stories, nats a token  1.453           1.453           1.453
    reward model's accuracy, of reachable     0.721 of 0.859  0.715 of 0.855  0.733 of 0.858
    gold, untouched -> PPO                    0.480 -> 0.771  0.476 -> 0.751  0.482 -> 0.782
    gold, best of 16 by the scorer                 0.863           0.850           0.865
    KL, nats a continuation of 64 tokens           2.6             2.3             2.7
    cross entropy under the untouched model   1.408 -> 1.343  1.412 -> 1.361  1.408 -> 1.342
    distinct bigrams                          0.598 -> 0.517  0.600 -> 0.521  0.598 -> 0.514

Best of 16 stays above PPO, which the KL coefficient holds close on purpose: at 0.1 in place of 0.55
gold reached 0.97 (seed 0) with 54 % of the distinct bigrams.
"""

from __future__ import annotations

import hashlib
import math
import pathlib
import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhf_jax import pipeline
from rlhf_jax.algorithms import ppo, reward_model, sft
from rlhf_jax.data import batches, builders, formats, tokenizers
from rlhf_jax.launch import Context, launch
from rlhf_jax.models import huggingface
from rlhf_jax.training.state import OptimizerConfig

MAX_PROMPT, MAX_RESPONSE = 32, 64


class Config(pipeline.AlignmentConfig):
    """With the reward model's data: `responses_per_prompt` samples of the policy are ranked by gold
    with Plackett-Luce noise of this `sharpness` (nats of preference a unit of gold)."""

    responses_per_prompt: int = 8
    sharpness: float = 8.0


config = Config(
    reward_model=reward_model.Config(
        num_steps=140,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20, schedule="cosine"),
    ),
    ppo=ppo.Config(
        num_iterations=20,
        batch_size=128,
        max_new_tokens=MAX_RESPONSE,
        num_minibatches=2,
        policy_optimizer=OptimizerConfig(learning_rate=3e-4, final_scale=0.1),
        critic_optimizer=OptimizerConfig(learning_rate=1e-3, final_scale=0.1),
        kl_coef=0.55,
    ),
)


def read_lexicon(path: pathlib.Path) -> dict[str, float]:
    """Word -> mean valence in [-4, 4], from VADER's tab-separated file."""
    if not path.is_file():
        raise ValueError(f"{path}: not found; --data names the folder of real data")
    lexicon = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            word, valence, *_ = line.split("\t")
            lexicon[word] = float(valence)
        except ValueError:
            raise ValueError(f"{path.name}:{number}: not 'word, tab, mean valence'") from None
    return lexicon


def sentiment(lexicon: dict[str, float], text: str) -> float:
    """Sum s of the words' valences, as s / sqrt(s^2 + 15), in (-1, 1). No word known: 0."""
    total = sum(lexicon.get(word, 0.0) for word in re.findall(r"[a-z']+", text.lower()))
    return total / math.sqrt(total**2 + 15.0)


class Stories(NamedTuple):
    """Rows: how stories begin, for training and held out, and the rest of the held-out ones."""

    prompts: list[dict]
    prompts_eval: list[dict]
    endings_eval: list[dict]


def read_stories(path: pathlib.Path) -> Stories:
    """Stories cut after their first sentence; a quarter of the openings is held out."""
    stories = Stories([], [], [])
    seen = set()
    for row in builders.load(path):
        text = formats.demonstration(*row).completion
        opening = re.split(r"(?<=[.!?])[\s\"]", text, maxsplit=1)[0]
        held_out = int(hashlib.sha256(opening.encode()).hexdigest(), 16) % 4 == 0
        rest = text[len(opening) :]
        if held_out and rest.strip():
            stories.endings_eval.append({"prompt": opening, "completion": rest})
        if opening not in seen:
            seen.add(opening)
            (stories.prompts_eval if held_out else stories.prompts).append({"prompt": opening})
    return stories


def no_score(params, tokens, attend, mask):
    """No reward: the samples that the reward model will learn from."""
    del params, tokens, attend
    return jnp.zeros(mask.shape[0])


def rank_samples(config: Config, context: Context, tokenizer, gold, policy, prompts):
    """Samples of the policy on `prompts`, ranked with noise: (Examples, best reachable accuracy).

    Ranks are drawn from Plackett-Luce (Gumbel noise on sharpness * gold), so that each pair has
    Bradley-Terry noise; the best reachable accuracy is how often gold itself agrees with them.
    """
    respond = pipeline.responder(config, context, tokenizer, prompts, policy, no_score, {})
    draws = [respond(policy, 1000 + i) for i in range(config.responses_per_prompt)]
    judged = np.stack([pipeline.evaluate(tokenizer, gold, draw).gold for draw in draws], axis=1)
    rng = np.random.default_rng((config.seed, len(prompts)))
    noisy = config.sharpness * judged + rng.gumbel(size=judged.shape)
    ranks = np.argsort(np.argsort(-noisy, axis=1), axis=1)
    samples = [
        ([draw.tokens[b][draw.attend[b] > 0] for draw in draws], ranks[b].tolist())
        for b in range(len(prompts))
    ]
    first, second = np.triu_indices(judged.shape[1], 1)
    gaps = np.abs(judged[:, first] - judged[:, second])
    reachable = np.mean(1.0 / (1.0 + np.exp(-config.sharpness * gaps)))
    examples = batches.sampled_comparisons(samples, tokenizer, MAX_PROMPT + MAX_RESPONSE)
    return examples, float(reachable)


def run(config: Config, context: Context) -> dict:
    """Ranks samples, trains, evaluates; returns the summary."""
    if context.data is None:
        raise ValueError("this experiment reads real data: name its folder by --data DIR")
    folder = context.data / "models" / "stories260K"
    policy = huggingface.load(folder, context.mesh)
    pipeline.check(config, context.mesh, policy.config, MAX_PROMPT)
    tokenizer = tokenizers.from_folder(folder)
    tokenizers.check_vocab(tokenizer, policy.config.vocab_size)
    lexicon = read_lexicon(context.data / "lexicon" / "vader_lexicon.txt")
    stories = read_stories(context.data / "stories" / "tinystories_sample.jsonl.gz")
    prompts = batches.prompts(stories.prompts, tokenizer, MAX_PROMPT)
    prompts_eval = batches.prompts(stories.prompts_eval, tokenizer, MAX_PROMPT)

    def gold(prompt: str, response: str) -> float:
        del prompt
        return sentiment(lexicon, response)

    clock = pipeline.Clock()
    with clock("sft"):  # done already: how well the untouched model tells the held-out stories
        endings = batches.demonstrations(
            stories.endings_eval, tokenizer, MAX_PROMPT, policy.config.max_length - MAX_PROMPT
        )
        held_out = batches.Loader(endings, 32, config.seed)
        eval_loss = sft.evaluate(sft.Config(), policy, held_out, mesh=context.mesh)
    with clock("comparisons"):
        ranked = rank_samples(config, context, tokenizer, gold, policy, prompts)[0]
        judged = rank_samples(config, context, tokenizer, gold, policy, prompts_eval)
    task = pipeline.Task(
        tokenizer=tokenizer,
        comparisons=ranked,
        comparisons_eval=judged[0],
        centre_on=ranked,
        prompts=prompts,
        prompts_eval=prompts_eval,
        gold=gold,
    )
    figures, compared = pipeline.align(config, context, task, policy, clock)

    def nats_per_token(answers: pipeline.Evaluation) -> float:
        return float(answers.reference_nats.sum() / answers.lengths.sum())

    kept = {
        "cross_entropy_before": nats_per_token(compared.before),
        "cross_entropy_after": nats_per_token(compared.after),
    }
    return {
        "sft": {"eval_loss": eval_loss},
        "reward_model": figures["reward_model"] | {"best_reachable_accuracy": judged[1]},
        "ppo": figures["ppo"] | kept,
        "seconds": clock.seconds,
    }


if __name__ == "__main__":
    launch(run, config)
