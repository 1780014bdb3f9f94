"""Stacked layers: the same model, gradients, runs and checkpoints as layers with a name each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from rlhf_jax import losses, sharding
from rlhf_jax.models import heads, huggingface, lora, stacking, transformer
from rlhf_jax.training import state as training
from rlhf_jax.training.checkpoint import Checkpoints

ALIKE = dataclasses.replace(tiny.SHAPE, num_layers=3)
# Layers 0, 2, 4 have a window, 1, 3 have none: two repetitions of the pattern and one layer more.
ALTERNATING = dataclasses.replace(tiny.SHAPE, num_layers=5, window=3, full_layers=(1, 3))
UNLIKE = dataclasses.replace(tiny.SHAPE, num_layers=3, window=3, full_layers=(0,))
SHAPES = {"alike": ALIKE, "alternating": ALTERNATING}


def made(shape):
    return jax.jit(transformer.init, static_argnums=0)(shape, jax.random.key(1))


def rows():
    rng = np.random.default_rng(0)
    attend = np.ones((8, 10), np.int32)
    attend[0, :4] = attend[1, 7:] = 0
    return jnp.asarray(rng.integers(0, 264, (8, 10))), jnp.asarray(attend)


@jax.jit
def gradient(model):
    tokens, attend = rows()

    def loss(model):
        hidden = transformer.hidden_states(model, tokens, attend)
        return losses.masked_mean(-heads.token_logprobs(model, hidden, tokens)[0], attend)

    return jax.value_and_grad(loss)(model)


@pytest.mark.parametrize(
    ("shape", "size", "left"),
    [(ALIKE, 1, []), (ALTERNATING, 2, ["layer_4"]), (UNLIKE, 3, ["layer_0", "layer_1", "layer_2"])],
)
def test_the_repeating_pattern_is_stacked_and_what_is_left_keeps_its_name(shape, size, left):
    model = made(shape)
    stacked = stacking.stack(model)
    assert transformer.pattern(shape) == size
    assert [x for x in stacked.weights if x.startswith("layer_")] == left
    if len(left) < 3:
        kinds = stacked.weights["layers"]
        assert list(kinds) == [f"layer_{i}" for i in range(size)]
        last = model.weights[f"layer_{shape.num_layers - len(left) - 1}"]["mlp"]["up"]["kernel"]
        assert np.array_equal(kinds[f"layer_{size - 1}"]["mlp"]["up"]["kernel"][-1], last)
    back = stacking.unstack(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(model)
    assert tiny.equal(back, model)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_loop_over_layers_that_recomputes_has_the_same_loss_and_gradients(shape, remat):
    model = made(shape)
    plain, gradients = gradient(model)
    other = dataclasses.replace(model, config=dataclasses.replace(shape, remat=remat))
    for variant in (other, stacking.stack(other)):
        value, found = gradient(variant)
        assert abs(value - plain) < 1e-6
        found = stacking.unstack(found)
        worst = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), found.weights, gradients.weights)
        assert max(jax.tree.leaves(worst)) < 1e-6


def test_recomputing_everything_keeps_less_than_keeping_everything():
    def kept(remat):
        shape = dataclasses.replace(ALIKE, num_layers=8, remat=remat, d_ff=512)
        model = jax.eval_shape(lambda: stacking.stack(transformer.init(shape, jax.random.key(0))))
        return gradient.lower(model).compile().memory_analysis().temp_size_in_bytes

    none, dots, full = map(kept, ("none", "dots", "full"))
    assert full < dots < none


def test_models_that_share_their_base_still_share_it_when_stacked():
    shape = dataclasses.replace(ALIKE, scan_layers=True)
    base = made(shape)
    adapted = lora.attach(base, lora.Config(rank=2), jax.random.key(0))
    models = stacking.stack_all(tiny.mesh(), {"reference": base, "policy": adapted})

    def kernel(model):
        return model.weights["layers"]["layer_0"]["mlp"]["up"]["kernel"]

    assert kernel(models["reference"]) is kernel(models["policy"])
    assert tiny.equal(stacking.unstack_all(models), {"reference": base, "policy": adapted})


def test_layers_are_stacked_by_platform_unless_the_configuration_says_so():
    plain, mesh = made(ALIKE), tiny.mesh()
    assert not stacking.is_wanted(plain, mesh)  # the mesh is of CPUs
    for choice in (True, False):
        shape = dataclasses.replace(ALIKE, scan_layers=choice)
        assert stacking.is_wanted(dataclasses.replace(plain, config=shape), mesh) == choice


def test_the_axis_of_layers_is_not_split_and_the_others_are_as_in_one_layer():
    mesh = tiny.mesh("1x2x4")
    name, shape = "policy/weights/layers/layer_0/mlp/up/kernel", (3, 32, 64)
    assert sharding.spec_for(mesh, name, shape) == P(None, "fsdp", "tensor")
    placed = sharding.place(mesh, stacking.stack(made(ALIKE)))
    kernel = stacking.unstack(placed).weights["layer_2"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == P("fsdp", "tensor")


def test_decay_spares_the_norms_of_stacked_layers_too():
    optimizer = training.make_optimizer(
        training.OptimizerConfig(weight_decay=0.5, schedule="constant"), 10
    )
    model = stacking.stack(made(ALIKE))
    zeros = jax.tree.map(jnp.zeros_like, model)
    updates, _ = optimizer.update(zeros, optimizer.init(model), model)
    layer = updates.weights["layers"]["layer_0"]
    assert not jnp.any(layer["mlp_norm"]["scale"])
    assert jnp.all(layer["mlp"]["up"]["kernel"] != 0)


@pytest.mark.parametrize("written", [True, False], ids=["stacked", "separate"])
def test_a_checkpoint_has_a_name_per_layer_and_restores_stacked_or_not(written, tmp_path):
    model = sharding.place(tiny.mesh("1x2x4"), made(ALTERNATING))
    state = {True: stacking.stack(model), False: model}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"policy": state[written], "step": jnp.int32(3)})
        stored = checkpoints.names()
        assert "policy.weights.layer_3.mlp.up.kernel" in stored
        assert not any("layers" in name for name in stored)
        like = {"policy": state[not written], "step": jnp.int32(0)}
        step, found = checkpoints.restore(like)
    assert step == 1 and found["step"] == 3
    assert tiny.equal(found["policy"], like["policy"])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(like)):
        assert a.sharding == b.sharding


def test_a_folder_is_written_whatever_way_a_model_is_computed(tmp_path):
    shape = dataclasses.replace(ALIKE, remat="full", scan_layers=True, dtype="bfloat16")
    huggingface.save(tmp_path / "new", made(shape))
    huggingface.save(tmp_path / "like", made(shape), like=tmp_path / "new")
    for name in ("new", "like"):
        assert huggingface.load(tmp_path / name).config == ALIKE
