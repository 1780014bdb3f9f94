"""PPO on real input: a pretrained story teller learns to tell happier stories.

    python experiments/stories_sentiment.py --data DIR

DIR (or RLHF_JAX_DATA) holds `models/stories260K` (a Llama of 260,032 parameters, A. Karpathy's
tinyllamas), `stories/tinystories_sample.jsonl.gz` (TinyStories) and `lexicon/vader_lexicon.txt`
(VADER). The policy is the pretrained model, a prompt is how a real story begins. Gold is the sum of
the valences that VADER's lexicon gives to the words of the continuation, s / sqrt(s^2 + 15). The
reward model never sees it: it is trained on pairs of the policy's own samples, labelled by gold
with Bradley-Terry noise. The stories must stay stories: the summary holds the cross entropy of
the continuations under the untouched model and their share of distinct bigrams, before and after.
"""

from __future__ import annotations

import hashlib
import math
import pathlib
import re

import jax.numpy as jnp
import numpy as np

from rlhf_jax import pipeline
from rlhf_jax.algorithms import ppo, reward_model
from rlhf_jax.data import batches, builders, formats, tokenizers
from rlhf_jax.launch import Context, launch
from rlhf_jax.models import huggingface
from rlhf_jax.training.state import OptimizerConfig

MAX_PROMPT, MAX_RESPONSE = 32, 64


class Config(pipeline.AlignmentConfig):
    """With the reward model's data: `responses_per_prompt` samples of the policy are ranked by gold
    with Plackett-Luce noise of this `sharpness` (nats of preference a unit of gold)."""

    responses_per_prompt: int = 4
    sharpness: float = 8.0


config = Config(
    reward_model=reward_model.Config(
        num_steps=200,
        batch_size=32,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20, schedule="cosine"),
    ),
    ppo=ppo.Config(
        num_iterations=32,
        batch_size=128,
        max_new_tokens=MAX_RESPONSE,
        num_minibatches=2,
        policy_optimizer=OptimizerConfig(learning_rate=3e-4, final_scale=0.1),
        critic_optimizer=OptimizerConfig(learning_rate=1e-3, final_scale=0.1),
        kl_coef=0.1,
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


def story_prompts(path: pathlib.Path) -> tuple[list[dict], list[dict]]:
    """How stories begin, their first sentence: for training, and a held-out quarter."""
    texts = (formats.demonstration(*row).completion for row in builders.load(path))
    openings = sorted({re.split(r"(?<=[.!?])[\s\"]", text, maxsplit=1)[0] for text in texts})
    held_out = [int(hashlib.sha256(text.encode()).hexdigest(), 16) % 4 == 0 for text in openings]
    rows = [{"prompt": text} for text in openings]
    return [r for r, out in zip(rows, held_out) if not out], [
        r for r, out in zip(rows, held_out) if out
    ]


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
    openings = story_prompts(context.data / "stories" / "tinystories_sample.jsonl.gz")
    prompts, prompts_eval = (batches.prompts(rows, tokenizer, MAX_PROMPT) for rows in openings)

    def gold(prompt: str, response: str) -> float:
        del prompt
        return sentiment(lexicon, response)

    clock = pipeline.Clock()
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
    with clock("reward_model"):
        scorer, summary_scorer = pipeline.train_scorer(config, context, task, policy)
    with clock("ppo"):
        trained = pipeline.optimise(config, context, task, policy, scorer).policy
    with clock("evaluation"):
        compared = pipeline.compare(config, context, task, policy, trained, scorer)

    def nats_per_token(judged: pipeline.Evaluation) -> float:
        return float(judged.reference_nats.sum() / judged.lengths.sum())

    return {
        "reward_model": summary_scorer | {"best_reachable_accuracy": judged[1]},
        "ppo": pipeline.summarise(config, compared)
        | {
            "cross_entropy_before": nats_per_token(compared.before),
            "cross_entropy_after": nats_per_token(compared.after),
        },
        "seconds": clock.seconds,
    }


if __name__ == "__main__":
    launch(run, config)
