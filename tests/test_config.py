"""Configurations: what they check, what of them is traced, and what they say to editors."""

import dataclasses
import math
import re
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from rlhf_jax import config as configs
from rlhf_jax.config import Config, Count, Decay, NonNegative, Positive, Range, Share, Whole
from rlhf_jax.training.state import OptimizerConfig


class Inner(Config):
    rate: float = 0.5
    steps: int = 3


class Outer(Config):
    name: str = "a"
    sizes: tuple[int, ...] = (1, 2)
    switch: bool = False
    coef: float = 0.1
    target: float | None = None
    inner: Inner = Inner()


class Extended(Outer):
    alpha: float = 7.0


def test_the_leaves_of_a_config_are_its_floats_and_those_of_nested_configs():
    assert jax.tree.leaves(Outer(target=2.0)) == [0.1, 2.0, 0.5]
    doubled = jax.tree.map(lambda x: 2 * x, Outer())
    assert doubled == Outer(coef=0.2, inner=Inner(rate=1.0))


def test_a_config_is_frozen_keyword_only_and_works_with_dataclasses():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Outer().coef = 1.0
    with pytest.raises(TypeError):
        Inner(0.5)
    assert dataclasses.replace(Outer(), switch=True) == Outer(switch=True)
    assert dataclasses.asdict(Inner()) == {"rate": 0.5, "steps": 3}


def test_a_subclass_brings_its_own_coefficient_as_a_leaf():
    assert jax.tree.leaves(Extended(alpha=3.0)) == [0.1, 0.5, 3.0]
    assert isinstance(Extended(), Outer)
    assert jax.jit(lambda c: c.alpha * c.coef)(Extended()) == pytest.approx(0.7)


def count_traces():
    traces = []

    @jax.jit
    def program(config):
        traces.append(config)
        total = config.coef * config.inner.rate * config.inner.steps
        return total if config.target is None else total + config.target

    return program, traces


def test_another_number_does_not_recompile_and_another_count_does():
    program, traces = count_traces()
    assert program(Outer()) == pytest.approx(0.15)
    assert program(Outer(coef=0.2)) == pytest.approx(0.3)
    assert program(Outer(inner=Inner(rate=1.0))) == pytest.approx(0.3)
    assert len(traces) == 1
    assert program(Outer(inner=Inner(steps=6))) == pytest.approx(0.3)
    assert len(traces) == 2


def test_switching_an_optional_number_on_recompiles_and_another_value_of_it_does_not():
    program, traces = count_traces()
    program(Outer())
    assert program(Outer(target=1.0)) == pytest.approx(1.15)
    assert program(Outer(target=2.0)) == pytest.approx(2.15)
    assert len(traces) == 2
    program(Outer())
    assert len(traces) == 2


# ----------------------------------------------------------------------------- what a Config checks


class Checked(Config):
    count: Count = 1
    whole: Whole = 0
    positive: Positive = 1.0
    non_negative: NonNegative = 0.0
    share: Share = 0.5
    decay: Decay = 0.9
    sizes: tuple[Count, ...] = ()
    top: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    schedule: Literal["linear", "cosine"] = "linear"
    several: Literal["auto"] | Count = "auto"
    switch: Literal[True, False, "auto"] = False
    every: Count | None = None
    target: Positive | None = None
    free: float = 0.0
    plain: int = 0
    flag: bool = False


@pytest.mark.parametrize(
    ("field", "good", "bad", "rule"),
    [
        ("count", (1, 7, np.int64(3)), (0, -3), "at least 1"),
        ("count", (), (2.0, "8", None, True), "a whole number at least 1"),
        ("whole", (0, 5), (-1,), "at least 0"),
        ("positive", (1e-9, 3), (0, 0.0, -1.0, math.nan), "above 0"),
        ("positive", (), (math.inf, 1e300), "finite"),
        ("positive", (3e38, 1e-37), (1e-50,), "above 0, as float32 holds it"),
        ("decay", (0, 0.999), (1, -0.1), r"in \[0, 1\)"),
        ("decay", (), (0.999999999,), r"in \[0, 1\), as float32 holds it"),
        ("sizes", ((), (1, 2)), ((1, 0),), "a tuple of numbers, each at least 1"),
        ("positive", (), (True, "3", None), "a number above 0"),
        ("count", (2**31 - 1,), (2**31, 2**70), "at most 2147483647"),
        ("non_negative", (0, 2.5), (-1e-9,), "at least 0"),
        ("share", (0, 0.3, 1), (-0.1, 1.1, math.nan), r"in \[0, 1\]"),
        ("top", (0.1, 1), (0, 1.5), r"in \(0, 1\]"),
        (
            "schedule",
            ("cosine",),
            ("constant_with_warmup", "", None, 3),
            "one of 'linear', 'cosine'",
        ),
        ("switch", (True, False, "auto"), (1, 0, 1.0), "one of True, False, 'auto'"),
        ("several", ("auto", 4), ("no", 0), "one of 'auto' or .*at least 1"),
        ("every", (None, 4), (0,), "at least 1 or None"),
        ("target", (None, 0.1, 4), (0.0, -1), "above 0 or None"),
        ("free", (-7, 1e30), (math.inf, -math.inf, math.nan), "finite"),
        ("free", (), (True, "3"), "a number"),
        ("plain", (-7, 7), (1.5, True, "3"), "a whole number"),
        ("flag", (True, False), (0, 1.0, None, "yes"), "True or False"),
    ],
)
def test_a_value_outside_its_range_or_choices_is_refused_by_field_value_and_rule(
    field, good, bad, rule
):
    for value in good:
        found = vars(Checked(**{field: value}))[field]
        assert found == value or math.isnan(found)
    for value in bad:
        with pytest.raises(
            ValueError, match=rf"^{field}=.*{re.escape(str(value))}.* must be {rule}"
        ):
            Checked(**{field: value})
        with pytest.raises(ValueError):
            dataclasses.replace(Checked(), **{field: value})


def test_the_schedules_of_other_libraries_are_refused_and_not_taken_for_cosine():
    with pytest.raises(
        ValueError, match="schedule='constant_with_warmup' must be one of 'constant'"
    ):
        OptimizerConfig(schedule="constant_with_warmup")


class Sizes(Config):
    batch_size: Count = 8
    num_minibatches: Count = 1
    scale: NonNegative | None = None

    def check(self):
        if self.batch_size % self.num_minibatches:
            raise ValueError(f"batch_size={self.batch_size} is no multiple of num_minibatches")
        if self.scale is not None and self.scale > self.batch_size:
            raise ValueError("scale is above batch_size")


class Nested(Config):
    sizes: Sizes = Sizes()
    steps: Count = 1

    def check(self):
        if self.sizes.batch_size > 99:
            raise ValueError("too large a batch")


class Own(Sizes):
    units: ClassVar[str] = "rows"
    num_frozen_layers: int = 0
    callback: type = dict
    lists: tuple = ()


def test_rules_between_fields_are_checked_in_nested_and_derived_configs_too():
    for wrong in ({"num_minibatches": 3}, {"scale": 9.0}):
        for kind in (Sizes, Own):
            with pytest.raises(ValueError):
                kind(**wrong)
    with pytest.raises(ValueError, match="too large"):
        Nested(sizes=Sizes(batch_size=100))


def test_a_field_of_a_users_own_may_be_called_and_hold_what_it_likes():
    assert Own().num_frozen_layers == 0 and Own.units == "rows"
    assert Own(num_frozen_layers=-1).num_frozen_layers == -1
    with pytest.raises(ValueError, match="no multiple"):  # though `callback` is no plain value
        Own(num_minibatches=3, callback=list)


# -------------------------------------------------------------------------- what it does not check


def test_a_whole_number_given_for_a_real_field_does_not_compile_anew():
    program, traces = count_traces()
    assert type(Outer(coef=1).coef) is float and type(Outer(target=2).target) is float
    assert type(Inner(rate=1).rate) is float and type(Inner(steps=1).steps) is int
    for given in (1.0, 1):
        program(Outer(coef=given, inner=Inner(rate=given)))
    assert len(traces) == 1
    program(dataclasses.replace(Outer(), coef=3))
    assert len(traces) == 1


def test_tree_functions_put_whatever_they_like_in_place_of_the_numbers():
    config = Nested(sizes=Sizes(scale=1.0))
    sharding = SingleDeviceSharding(jax.devices()[0])
    for value in (None, sharding, -7, 0, "x"):
        made = jax.tree.map(lambda _, value=value: value, config)
        assert type(made) is Nested and made.steps == 1
        assert made.sizes.scale is value  # neither refused nor turned into a float
    assert jax.tree.structure(config).unflatten([object()]).sizes.batch_size == 8


def test_a_sweep_over_one_number_is_one_vmapped_program():
    config = Checked()
    swept = dataclasses.replace(config, share=jnp.array([0.1, 0.2, 0.3]))
    axes = jax.tree.map(lambda leaf: 0 if np.ndim(leaf) else None, swept)
    doubled = jax.vmap(lambda c: 2 * c.share * c.positive, in_axes=(axes,))(swept)
    np.testing.assert_allclose(doubled, [0.2, 0.4, 0.6], rtol=1e-6)


def test_a_traced_number_may_stand_in_for_a_plain_one_inside_a_program():
    @jax.jit
    def program(share):
        return dataclasses.replace(Checked(), share=share).share + 0

    @jax.jit
    def checked(scale):
        return Nested(sizes=Sizes(scale=scale)).sizes.scale + 0

    assert program(3.0) == 3.0 and checked(99.0) == 99.0


def test_the_leaves_are_named_by_their_fields():
    (path, _), *_ = jax.tree_util.tree_flatten_with_path(Outer(inner=Inner(rate=0.25)))[0][::-1]
    assert jax.tree_util.keystr(path) == ".inner.rate"


def test_asking_a_traced_number_whether_it_is_large_is_explained_in_one_sentence():
    def loss(config, x):
        if config.coef > 0:
            x = x + config.coef
        return x

    def as_float(config, x):
        return x * float(config.coef)

    def call(function):
        with configs.explained_tracing():
            return jax.grad(lambda x: function(Outer(), x))(1.0)

    assert call(loss) == 1.0  # nothing is traced that the loss asks about
    for function, line in ((loss, "if config.coef > 0:"), (as_float, "float(config.coef)")):
        with pytest.raises(ValueError) as raised:
            with configs.explained_tracing():
                jax.jit(function)(Outer(), 1.0)
        error = str(raised.value)
        assert "\n" not in error and line in error and "test_config.py:" in error
        assert "jnp.where or jax.lax.cond, or declare the field of the Config as int" in error
        assert isinstance(raised.value.__cause__, jax.errors.ConcretizationTypeError)


def test_errors_of_another_kind_pass_through_the_explanation():
    with pytest.raises(ZeroDivisionError):
        with configs.explained_tracing():
            1 / 0  # noqa: B018


# ------------------------------------------------------------------------------------------- seeds


def test_a_stages_seed_is_folded_into_that_of_the_run_and_not_added():
    assert configs.fold_seed(1, 1) != configs.fold_seed(2, 0)
    seeds = [configs.fold_seed(a, b) for a in range(100) for b in range(100)]
    assert len(set(seeds)) > 9_990 and all(0 <= seed < 2**31 for seed in seeds)
    # About half of them in the upper half, as if drawn: 4.5 standard deviations of a fair coin.
    assert abs(sum(seed >= 2**30 for seed in seeds) - 5_000) < 225
    assert configs.fold_seed(0, "ppo") != configs.fold_seed(0, "sft")
    # Of the next process too, unlike Python's own hash of a string.
    assert configs.fold_seed(7, "ppo") == 1620068530
