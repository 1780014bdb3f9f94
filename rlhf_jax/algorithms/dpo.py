"""Direct preference optimisation: a policy learns from comparisons without a reward model.

    dpo.run(config, policy, comparisons)
    dpo.run(config, policy, comparisons, loss_fn=dpo.simpo_loss, reference_free=True)

DPO (Rafailov et al. 2023, arXiv:2305.18290) is the rank loss of a reward model whose reward is
beta * (log p(y|x) - log p_ref(y|x)), so that what is trained is the policy p itself. Other losses
to pass as `loss_fn`: `hinge_loss`, `ipo_loss`, `kto_loss`, and with `reference_free=True`
`simpo_loss` and `orpo_loss`. A prompt may have more than two responses; see `loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import abstract, losses
from rlhf_jax import preference_losses as equations
from rlhf_jax.abstract import Program, Stage
from rlhf_jax.config import NonNegative, Positive, Range
from rlhf_jax.data import epoch, loader
from rlhf_jax.data.batches import Comparisons, Loader
from rlhf_jax.models import heads, transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.rewards import agreement
from rlhf_jax.training import loop
from rlhf_jax.training import state as training
from rlhf_jax.training.loop import Runtime
from rlhf_jax.training.metrics import Display
from rlhf_jax.training.state import MakeOptimizer

DISPLAY = Display(
    "DPO",
    ("loss", "rewards/accuracies"),
    {
        "loss": "Loss",
        "rewards/accuracies": "Accuracy of the implicit reward on comparisons",
        "rewards/margins": "Margin of the implicit reward, chosen minus rejected",
        "logps/chosen": "Log-probability of a chosen response, nats",
        "logps/rejected": "Log-probability of a rejected response, nats",
    },
)


class Config(loop.Config):
    """Settings of a DPO run; beta, gamma and the learning rate default to TRL 1.x's.

    `batch_size` counts prompts: all responses to one are one element of a batch.
    """

    optimizer: training.OptimizerConfig = training.OptimizerConfig(learning_rate=1e-6)
    # Reward per nat of log-ratio, or of mean log-probability in `simpo_loss`. In `ipo_loss` it is
    # the paper's tau, in `orpo_loss` the weight of the odds ratio.
    beta: Positive = 0.1
    # Only `loss` reads it: the share of comparisons that are taken to be the wrong way round.
    label_smoothing: Annotated[float, Range(0, 0.5)] = 0.0
    simpo_gamma: NonNegative = 0.5  # only `simpo_loss` reads it: the gap of rewards to be exceeded


class Result(NamedTuple):
    """The trained policy and the metrics of each step this process ran."""

    policy: Model
    history: list[dict[str, Any]]


class Responses(NamedTuple):
    """What policy and reference say of the responses to each prompt; absent responses have 0."""

    logps: Float[Array, "B K"]  # log p(y|x), summed over the response's tokens, nats
    ref_logps: Float[Array, "B K"] | None  # the reference's; None without one
    lengths: Float[Array, "B K"]  # of the responses in tokens, EOS included

    def means(self) -> Float[Array, "B K"]:
        """The mean of log p over the tokens of each response, nats."""
        return self.logps / jnp.maximum(self.lengths, 1.0)

    def log_ratios(self) -> Float[Array, "B K"]:
        """log p(y|x) - log p_ref(y|x), nats."""
        return self.logps - self.ref_logps

    def rewards(self, beta: losses.Scalar) -> Float[Array, "B K"]:
        """The implicit rewards: beta times the log-ratio, or times the mean without a reference."""
        return beta * (self.means() if self.ref_logps is None else self.log_ratios())


# -------------------------------------------------------------------------------------- the losses


def response_logps(model: Model, batch: Comparisons, micro_batches: int = 1) -> Float[Array, "B K"]:
    """log p(response | prompt) of all responses, [B, K, T] -> [B, K], nats; absent ones have 0.

    A sum over the response's own tokens, its EOS included. The prompt's are not scored.
    """
    prompts, responses, length = batch.tokens.shape

    def forward(*arrays):
        tokens, attend, mask = (x.reshape(-1, length) for x in arrays)
        hidden = transformer.hidden_states(model, tokens, attend)
        logprobs, _ = heads.token_logprobs(model, hidden, tokens)
        return losses.masked_sum(logprobs, mask, axis=1).reshape(-1, responses)

    # All responses of a prompt as one row, so that a slice of rows holds whole prompts.
    arrays = (batch.tokens, batch.attend, batch.mask)
    rows = (x.reshape(prompts, responses * length) for x in arrays)
    return heads.map_rows(forward, micro_batches, *rows, recompute=heads.must_recompute(model))


def measure(config: Config, params: dict, batch: Comparisons) -> Responses:
    """What the models in `params` say of a batch; there need not be a reference among them."""
    ref_logps = None
    if "reference" in params:
        frozen = jax.lax.stop_gradient(params["reference"])
        ref_logps = response_logps(frozen, batch, config.micro_batches)
    return Responses(
        response_logps(params["policy"], batch, config.micro_batches),
        ref_logps,
        jnp.sum(batch.mask, axis=2),
    )


def loss(config: Config, params: dict, batch: Comparisons):
    """Mean over prompts of -log sigmoid(gap of rewards), nats: DPO, eq. 7.

    A prompt with K > 2 responses gives the mean over all its pairs that differ in rank, as the rank
    loss of a reward model does; with K = 2 it is the published loss. With `label_smoothing` it is
    conservative DPO, as in the authors' code (in TRL 1.x only other losses read that setting). A
    margin that the data states is not read.
    """
    found, pairs = _compared(config, params, batch)
    gap = equations.gaps(found.rewards(config.beta))
    terms = equations.sigmoid_loss(gap, config.label_smoothing)
    return equations.mean_over_prompts(terms, pairs), _metrics(config, found, pairs)


def hinge_loss(config: Config, params: dict, batch: Comparisons):
    """`loss` with max(0, 1 - gap of rewards) for each pair."""
    found, pairs = _compared(config, params, batch)
    terms = equations.hinge_loss(equations.gaps(found.rewards(config.beta)))
    return equations.mean_over_prompts(terms, pairs), _metrics(config, found, pairs)


def ipo_loss(config: Config, params: dict, batch: Comparisons):
    """`loss` with (gap of log-ratios per token - 1 / (2 beta))^2 for each pair: IPO, eq. 17.

    The paper's equation has the log-ratios of whole responses. As in TRL, whose comment says that
    the authors confirmed it, they are divided by the number of the response's tokens.
    """
    found, pairs = _compared(config, params, batch)
    per_token = found.log_ratios() / jnp.maximum(found.lengths, 1.0)
    terms = equations.ipo_loss(equations.gaps(per_token), config.beta)
    return equations.mean_over_prompts(terms, pairs), _metrics(config, found, pairs)


def simpo_loss(config: Config, params: dict, batch: Comparisons):
    """`loss` with rewards beta * mean log p and a margin gamma: SimPO, arXiv:2405.14734, eq. 6.

    The paper's beta is 2 and more. Without the NLL of the chosen response that TRL adds by default.
    """
    found, pairs = _compared(config, params, batch, reference_free=True)
    gap = equations.gaps(found.rewards(config.beta)) - config.simpo_gamma
    terms = equations.sigmoid_loss(gap)
    return equations.mean_over_prompts(terms, pairs), _metrics(config, found, pairs)


def orpo_loss(config: Config, params: dict, batch: Comparisons):
    """NLL of the best responses + beta * mean of -log sigmoid(gap of log odds): ORPO, eqs. 6, 7.

    Hong et al. 2024 (arXiv:2403.07691), whose lambda is `beta`. The NLL is the mean over the tokens
    of the best-ranked responses of the whole batch, nats per token, as in fine-tuning; TRL counts
    the prompt's tokens too. The odds are those of the mean log-probability of a response.
    """
    found, pairs = _compared(config, params, batch, reference_free=True)
    gap = equations.gaps(equations.log_odds(found.means()))
    ratio = equations.mean_over_prompts(equations.sigmoid_loss(gap), pairs)
    best = _best(batch)
    total = losses.masked_sum(found.logps, best)
    nll = -total / jnp.maximum(losses.masked_sum(found.lengths, best), 1.0)
    metrics = {
        "nll_loss": nll,
        "log_odds_ratio": -ratio,  # as TRL calls it: the mean of log sigmoid(gap)
        "log_odds_chosen": equations.mean_over_prompts(gap, pairs),
    }
    return nll + config.beta * ratio, metrics | _metrics(config, found, pairs)


def kto_loss(config: Config, params: dict, batch: Comparisons):
    """Mean over responses of 1 - sigmoid(+-(reward - baseline)): KTO, arXiv:2402.01306, eq. 7.

    The sign is + for desirable responses. In a prompt whose responses differ in rank the best are
    desirable, and the others are not. Where they do not differ, as a single answer cannot
    (`batches.scored`), labels decide: a score above 1/2 is desirable. Both kinds weigh 1.

    The baseline is beta * max(0, KL), without a gradient, and the KL to the reference is estimated
    as in TRL: by the mean log-ratio of responses after a wrong prompt, here that of the next prompt
    of the batch. A response that is too long for its row there is cut off.
    Raises ValueError for a batch of one prompt.
    """
    _check_reference(params, reference_free=False)
    found = measure(config, params, batch)
    rewards = found.rewards(config.beta)
    moved = mismatched(batch)
    drift = measure(config, jax.lax.stop_gradient(params), moved).log_ratios()
    kl = jnp.maximum(losses.masked_mean(drift, moved.present), 0.0)
    desirable, labelled = _labels(batch)
    terms = equations.kto_loss(rewards=rewards, baseline=config.beta * kl, desirable=desirable)
    good, bad = labelled * desirable, labelled * (1.0 - desirable)
    figures = {"rewards": rewards, "logps": found.logps}
    metrics = {
        **_metrics(config, found, losses.ranked_pairs(batch.ranks, batch.present)),
        **{f"{name}/chosen": losses.masked_mean(x, good) for name, x in figures.items()},
        **{f"{name}/rejected": losses.masked_mean(x, bad) for name, x in figures.items()},
        "kl": kl,
    }
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return losses.masked_mean(terms, labelled), metrics


def mismatched(batch: Comparisons) -> Comparisons:
    """Each prompt with the responses to the prompt before it in the batch; the first, to the last.

    Raises ValueError for a batch of one prompt.
    """
    prompts, _, length = batch.tokens.shape
    if prompts < 2:
        raise ValueError(
            "kto_loss puts responses after other prompts of the batch, and batch_size=1 has no "
            "other; make it 2 or more"
        )
    donor = (jnp.arange(prompts) - 1) % prompts
    steps = jnp.arange(length)
    start = jnp.argmax(batch.mask > 0, axis=2)[..., None]  # the first token of each response
    source = steps - start + start[donor]

    def spliced(x):
        moved = jnp.take_along_axis(x[donor], jnp.clip(source, 0, length - 1), axis=2)
        return jnp.where(steps < start, x, jnp.where(source < length, moved, jnp.zeros_like(x)))

    return batch._replace(
        tokens=spliced(batch.tokens),
        attend=spliced(batch.attend),
        mask=spliced(batch.mask),
        present=batch.present * batch.present[donor],
    )


def _compared(
    config: Config, params: dict, batch: Comparisons, reference_free: bool = False
) -> tuple[Responses, Float[Array, "B K K"]]:
    """What the models say of a batch, and which response is better than which."""
    _check_reference(params, reference_free)
    if batch.ranks.shape[1] < 2:
        raise ValueError(
            "this loss compares responses to a prompt, but the batch has one response to each "
            "(K=1); give it batches.comparisons, or train on single labelled answers by kto_loss"
        )
    pairs = losses.ranked_pairs(batch.ranks, batch.present)
    return measure(config, params, batch), pairs


def _check_reference(params: dict, reference_free: bool) -> None:
    """Raises ValueError where a loss lacks its reference, or would leave one unused."""
    if reference_free and "reference" in params:
        raise ValueError(
            "this loss compares with no reference, but one would be held in memory; leave it out "
            "by reference_free=True"
        )
    if not reference_free and "reference" not in params:
        raise ValueError(
            "this loss compares the policy with a reference, and reference_free=True leaves it "
            "out; only simpo_loss and orpo_loss need none"
        )


def _best(batch: Comparisons) -> Float[Array, "B K"]:
    """1 on the responses that are better than another one and not worse than any."""
    pairs = losses.ranked_pairs(batch.ranks, batch.present)
    return jnp.max(pairs, axis=2) * (1.0 - jnp.max(pairs, axis=1))


def _labels(batch: Comparisons) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    """(1 on desirable responses, 1 on those that are known to be desirable or not)."""
    pairs = losses.ranked_pairs(batch.ranks, batch.present)
    differ = jnp.max(pairs, axis=(1, 2))[:, None]
    if batch.scores is None:
        return _best(batch), batch.present * differ
    return jnp.where(differ > 0, _best(batch), batch.scores > 0.5), batch.present


def _metrics(
    config: Config, found: Responses, pairs: Float[Array, "B K K"]
) -> dict[str, Float[Array, ""]]:
    return {
        **equations.pair_metrics(found.rewards(config.beta), pairs),
        **equations.sides("logps", found.logps, pairs),
    }


# ----------------------------------------------------------------------------------------- the run


def run(
    config: Config,
    policy: Model,
    comparisons: Loader,
    *,
    reference: Model | None = None,
    reference_free: bool = False,
    loss_fn: Callable = loss,
    make_optimizer: MakeOptimizer = training.make_optimizer,
    held_out: Loader | None = None,
    runtime: Runtime | None = None,
) -> Result:
    """Trains `policy` on comparisons, continuing from the newest checkpoint where there is one.

    The reference is `policy` as it is given, with its adapter if it has one, unless `reference` is
    another model; its arrays are shared, not copied. With `reference_free=True` none is held, for
    losses that compare with none. `held_out` is evaluated every `eval_every` steps ("eval/loss",
    "eval/accuracy" and its interval). The caller's parameters do not change. Raises ValueError if
    the batch does not divide over the mesh, TrainingStopped on a non-finite step.
    """
    runtime = runtime or Runtime()
    for data in filter(None, (comparisons, held_out)):
        loader.expect(data, "dpo.run", Comparisons)

    def figures(_: int, params: dict) -> dict[str, float]:
        frozen = params.get("reference")
        return evaluate(config, params["policy"], held_out, reference=frozen, mesh=runtime.mesh)

    trained, history = loop.fit(
        config,
        {"policy": policy},
        comparisons,
        loss_fn=loss_fn,
        make_optimizer=make_optimizer,
        name="dpo",
        display=DISPLAY,
        runtime=runtime,
        frozen=_frozen(policy, reference, reference_free),
        evaluate=figures if held_out else None,
    )
    return Result(trained["policy"], history)


def _frozen(policy: Any, reference: Any, reference_free: bool) -> dict[str, Any]:
    if reference_free and reference is not None:
        raise ValueError("reference= does nothing with reference_free=True; leave one of them out")
    return {} if reference_free else {"reference": policy if reference is None else reference}


def evaluate(
    config: Config,
    policy: Model,
    comparisons: Loader,
    *,
    reference: Model | None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, float]:
    """Held-out metrics {"loss", "accuracy", ...}, the same ones whichever loss trained the policy.

    The reward is beta times the log-ratio to the reference, or with None beta times the mean
    log-probability per token. The loss is -log sigmoid of its gaps, as in `loss` without smoothing,
    nats; the others are those of `agreement`: accuracy over pairs with its 95 % interval, and the
    accuracy of length alone. Raises ValueError if no two responses differ in rank.
    """
    models = _models(policy, reference)
    found = epoch.rows(_scored, (), (config, models), comparisons, mesh)
    scores, ranks, present = (jnp.asarray(found[x]) for x in ("scores", "ranks", "present"))
    terms = equations.sigmoid_loss(equations.gaps(scores))
    mean = equations.mean_over_prompts(terms, losses.ranked_pairs(ranks, present))
    return {"loss": float(mean)} | agreement.agreement(**found)


def _models(policy: Any, reference: Any) -> dict[str, Any]:
    return {"policy": policy} | ({} if reference is None else {"reference": reference})


def _scored(config: Config, params: dict, batch: Comparisons) -> dict[str, Array]:
    """What `agreement.agreement` takes, of a batch."""
    found = measure(config, params, batch)
    return {
        "scores": found.rewards(config.beta),
        "ranks": batch.ranks,
        "present": batch.present,
        "lengths": jnp.sum(batch.mask > 0, axis=2),
    }


def programs(
    config: Config,
    policy: Model,
    length: int,
    mesh: jax.sharding.Mesh,
    *,
    responses: int = 2,
    reference: Model | None = None,
    reference_free: bool = False,
    loss_fn: Callable = loss,
    make_optimizer: MakeOptimizer = training.make_optimizer,
    resident: Any = (),
) -> Stage:
    """What `run` and `evaluate` run; `result` is the trained policy.

    The comparisons have `responses` rows of `length` tokens. The models are trees of shapes, and
    `resident` is what the experiment holds besides: see `abstract`.
    """
    batch = abstract.comparisons(mesh, config.batch_size, length, responses)
    frozen = _frozen(policy, reference, reference_free)
    stage = abstract.supervised(
        config,
        {"policy": policy},
        batch,
        mesh,
        loss_fn=loss_fn,
        name="dpo",
        frozen=frozen,
        make_optimizer=make_optimizer,
        resident=resident,
    )
    trained = stage.result["policy"]
    held = stage.held if config.eval_every else (policy, frozen, resident)
    scored = evaluation(
        config, trained, batch, mesh, reference=frozen.get("reference"), resident=held
    )
    return Stage([*stage.programs, scored], trained, stage.held)


def evaluation(
    config: Config,
    policy: Model,
    batch: Comparisons,
    mesh: jax.sharding.Mesh,
    *,
    reference: Model | None,
    name: str = "dpo: evaluate",
    resident: Any = (),
) -> Program:
    """What `evaluate` runs on a batch; all but `config` are shapes."""
    args = (config, _models(policy, reference))
    return abstract.over_rows(name, _scored, (), args, batch, mesh, resident)
