"""Plans: programs compiled for a TPU slice that is not there, and what is read off them."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import abstract, launch, plan, sharding
from rlhf_jax.abstract import Program
from rlhf_jax.algorithms import ppo, reward_model, sft
from rlhf_jax.config import Config
from rlhf_jax.cost import Collective, Cost
from rlhf_jax.data.records import Ends
from rlhf_jax.hlo import Shape
from rlhf_jax.models import lora, transformer
from rlhf_jax.sampling import Sampling

GIB = 2**30
ENDS = Ends((1,), 0)
# No two products of sizes are equal, so that an array is known by its number of elements.
SHAPE = transformer.Config(
    vocab_size=4096,
    num_layers=2,
    d_model=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    d_ff=640,
    max_length=1024,
    tied=True,
    dtype="bfloat16",
)
ROWS, LENGTH = 8, 256
# Rows of SFT are short, so that no kernel hides the work of their attention, and so many that the
# head takes two chunks.
SFT, SHORT = sft.Config(batch_size=128), 64
PPO = ppo.Config(
    batch_size=ROWS,
    num_epochs=2,
    num_minibatches=2,
    sampling=Sampling(max_new_tokens=LENGTH // 2),
)
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra [plan]"
)


@pytest.fixture(scope="module")
def slice_mesh():
    return sharding.make_mesh(devices=plan.topology("v5e:2x2"))


def stages(mesh, shape=SHAPE):
    """(SFT, reward model, PPO) from this shape."""
    tuned = sft.programs(SFT, abstract.model(shape, mesh), SHORT, mesh)
    ranked = reward_model.programs(
        reward_model.Config(batch_size=ROWS // 2), tuned.result, LENGTH, mesh
    )
    aligned = ppo.programs(
        PPO,
        policy=tuned.result,
        scorer=ranked.result,
        critic=ranked.result,
        max_prompt=LENGTH // 2,
        ends=ENDS,
        mesh=mesh,
    )
    return tuned, ranked, aligned


@pytest.fixture(scope="module")
def rows(slice_mesh):
    """What all programs of the three stages take on 2x2 chips of a v5e, by name."""
    with plan.compiler():
        return {
            program.name: plan.compiled(program, slice_mesh)
            for stage in stages(slice_mesh)
            for program in stage.programs
            if program.name
            not in ("sft: evaluate", "reward_model: evaluate", "reward_model: centre")
        }


def size_of(tree):
    """Bytes of a tree of shapes on one device."""
    return sum(map(sharding.device_bytes, jax.tree.leaves(tree)))


# --- slices -------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    ("name", "count"),
    [("v4:4x4x4", 64), ("v5e:16x16", 256), ("v5p:4x4x8", 128), ("v6e:16x16", 256), ("v6e:1x1", 1)],
)
def test_a_slice_has_a_device_for_each_chip(name, count):
    mesh = sharding.make_mesh(devices=plan.topology(name))
    assert mesh.devices.size == count
    assert plan.chip_of(mesh) is plan.CHIPS[name.partition(":")[0]]


@needs_compiler
@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("v5e:4x5", "v5e:4x4"),
        ("v5e:4x4x4", "v5e:4x4"),
        ("V5E:4x4", "v5e:4x4"),
        ("v5litepod:4x4", "v5e:4x4"),
        ("v5p:4x8", "v5p:4x4x8"),
        ("v5p", "v5p:"),
        ("tpu", "v"),
    ],
)
def test_an_unknown_slice_is_refused_with_a_guess(name, guess):
    with pytest.raises(ValueError, match=f"^--plan {name}: no such slice; did you mean {guess}"):
        plan.topology(name)


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"v5e:4x4: .* pip install -e '\.\[plan\]'$"):
        plan.topology("v5e:4x4")


@needs_compiler
@pytest.mark.parametrize(("fsdp", "change"), [(2, "raise"), (8, "lower")])
def test_a_mesh_of_given_devices_uses_all_of_them(fsdp, change):
    devices = plan.topology("v5e:2x2")
    message = f"needs {fsdp} devices, but there are 4; {change} a size"
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(fsdp=fsdp, devices=devices)


# --- figures ------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_compiler
def test_two_more_layers_cost_two_layers_more(rows, slice_mesh):
    """A forward pass multiplies each token by every kernel and each pair of tokens twice; the
    backward pass takes twice that again."""
    shape = dataclasses.replace(SHAPE, num_layers=4)
    with plan.compiler():
        deep = plan.compiled(stages(slice_mesh, shape)[0].programs[0], slice_mesh)
    kernels = 256 * (4 * 64) * 2 + 256 * (2 * 64) * 2 + 3 * 256 * 640
    on_a_device = SFT.batch_size // 4
    tokens, pairs = on_a_device * SHORT, on_a_device * 4 * SHORT * SHORT
    layer = 3 * 2 * (tokens * kernels + pairs * 64 * 2)
    assert deep.cost.flops - rows["sft: step"].cost.flops == 2 * layer
    # Parameters and both moments in float32, a quarter of them on each device.
    assert deep.total - rows["sft: step"].total > 2 * 3 * 4 * kernels / 4


@needs_compiler
def test_the_head_is_counted_once_for_every_chunk(rows):
    """Forward, forward again in the backward pass, and its two products."""
    kernels = 256 * (4 * 64) * 2 + 256 * (2 * 64) * 2 + 3 * 256 * 640
    rows_here = SFT.batch_size // 4
    tokens, pairs = rows_here * SHORT, rows_here * 4 * SHORT * SHORT
    layers = 2 * 3 * 2 * (tokens * kernels + pairs * 64 * 2)
    head = 4 * 2 * tokens * 256 * 4096
    assert rows["sft: step"].cost.flops == pytest.approx(layers + head, rel=1e-3)


@needs_compiler
def test_what_a_program_does_not_read_is_added_to_what_it_needs(rows, slice_mesh):
    tuned, ranked, aligned = stages(slice_mesh)
    policy, scorer = size_of(tuned.result), size_of(ranked.result)
    # Sampling reads the trained policy alone. The moments, two for each parameter of policy and
    # critic, the critic, and the models that the run was given lie beside it, and so do reference
    # and scorer as its programs read them: matrices in bfloat16, half as large. A norm is a vector
    # whose layout is padded, and counters are a few bytes.
    beside = 2 * (policy + scorer) + scorer + policy + scorer + (policy + scorer) / 2
    assert rows["ppo: sample"].elsewhere == pytest.approx(beside, rel=0.01)
    # The update reads neither reference nor scorer, nor what the run was given.
    unread = 1.5 * (policy + scorer)
    assert rows["ppo: update"].elsewhere == pytest.approx(unread, rel=0.01)
    # While a checkpoint is read, the state is there twice.
    state = 3 * (policy + scorer)
    assert rows["ppo: restore"].total == pytest.approx(2 * state + unread, rel=0.01)


@needs_compiler
def test_models_that_share_a_base_hold_it_once(slice_mesh):
    adapter, key = lora.Config(rank=4), jax.random.key(0)
    base = abstract.model(SHAPE, slice_mesh)
    policy = abstract.derived(lora.attach, slice_mesh, base, adapter, key)
    assert policy.weights["embed"]["embedding"] is base.weights["embed"]["embedding"]
    tuned = sft.programs(SFT, policy, LENGTH, slice_mesh)
    restore = next(x for x in tuned.programs if x.function is None)
    adapters = sum(
        sharding.device_bytes(x)
        for path, x in jax.tree.leaves_with_path(policy)
        if path[-1].key in lora.TRAINED
    )
    # The base as given and as the step reads it, in bfloat16; the adapters as given, and in two
    # states with two moments each. Norms and scales are not halved, which is little.
    held = size_of(base) * 1.5 + adapters * (1 + 2 * 3)
    assert plan.compiled(restore, slice_mesh).total == pytest.approx(held, rel=2e-3)


# --- what must not be transferred ---------------------------------------------------------------


def transfer(kind="all-gather", dims=(256, 640), loops=("jit(step)/while",)):
    shapes = (Shape("bf16", dims),)
    return Cost(collectives=(Collective(kind, shapes, 4, 1, loops, "jit(step)/x"),))


@needs_compiler
@pytest.mark.parametrize(
    ("found", "broken"),
    [
        (transfer(), "all-gather of bf16[256,640] in the loop jit(step)/while, 1 times"),
        (transfer(dims=(640, 256)), "all-gather"),  # transposed
        (transfer(dims=(2, 32, 4096)), "all-gather"),  # as wide as the vocabulary
        (transfer(loops=("jit(step)/jvp(Trunk)/while",)), None),  # the scan over layers
        (transfer(loops=("jit(step)/jvp()/while", "jit(step)/jvp(Trunk)/while")), None),
        (transfer(loops=()), None),
        (transfer(dims=(2, 32, 256)), None),  # activations
        (transfer(dims=(4096,)), None),
        (transfer("all-reduce", loops=()), "all-reduce of a whole gradient bf16[256,640]"),
        (transfer("reduce-scatter", loops=()), None),
        (transfer("all-reduce", (64, 640), ()), None),  # a part of it, over data
        (transfer("all-reduce", (4, 64, 640), ()), None),  # rows of tokens
    ],
)
def test_what_a_rule_forbids(slice_mesh, found, broken):
    program = stages(slice_mesh)[0].programs[0]
    told = plan.violations(program, found, slice_mesh)
    assert not told if broken is None else broken in told[0]


@needs_compiler
def test_loops_over_optimizer_steps_may_gather_weights(slice_mesh):
    update = next(x for x in stages(slice_mesh)[2].programs if x.updates)
    steps, chunks = "jit(update)/while/body/while", "jit(update)/while/body/while/body/jvp()/while"
    assert not plan.violations(update, transfer(loops=("jit(update)/while", steps)), slice_mesh)
    assert plan.violations(update, transfer(loops=(steps, chunks)), slice_mesh)


@needs_compiler
def test_no_weight_goes_round_in_a_loop_and_no_gradient_is_reduced_whole(rows):
    assert not [f"{name}: {x}" for name, row in rows.items() for x in row.broken]


# --- the verdict --------------------------------------------------------------------------------


def test_the_compilers_message_is_read():
    short = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (128.00G) exceeds available HBM (15.75G)."
    )
    assert plan.exhausted(short) == 128 * GIB
    long = (
        "RESOURCE_EXHAUSTED: Compilation failure: Ran out of memory in memory space hbm. Used "
        "25.20G of 15.75G hbm. Exceeded hbm capacity by 9.45G."
    )
    assert plan.exhausted(long) == pytest.approx(25.2 * GIB)
    assert plan.exhausted("INVALID_ARGUMENT: Used 1G of 2G") is None


class Toy(Config):
    rows: int = ROWS


def programs(config, context):
    mesh = context.mesh
    model = abstract.model(dataclasses.replace(SHAPE, num_layers=1), mesh)
    batch = dataclasses.replace(SFT, batch_size=config.rows)
    step, restore, _ = sft.programs(batch, model, LENGTH, mesh).programs
    return [step, restore, step._replace(name="again")]


def run(config, context):
    raise AssertionError("a plan runs nothing")


def started(*flags):
    return launch.launch(run, Toy(), ["--plan", "v5e:2x2", *flags], programs=programs)


@pytest.fixture
def apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHF_JAX_DATA", raising=False)
    yield
    assert not list(tmp_path.iterdir())  # a plan writes nothing


@needs_compiler
def test_a_plan_that_fits_prints_its_table(apart, capsys):
    assert started() == {}
    told = capsys.readouterr().out
    assert "4 x TPU v5 lite, mesh data=1,fsdp=4,tensor=1, compiler effort -1" in told
    lines = [line.split(" | ") for line in told.splitlines() if line.startswith("| ")]
    (_, *step), _, (_, *again) = lines[1:]
    assert len(step) == len(plan.COLUMNS) - 1 and "all-gather" in step[6]
    assert again[:-1] == step[:-1] and again[-1] == "0 |"  # compiled once
    assert re.search(r"\nfits: sft: \w+ holds 0.\d\d of 15.75 GiB", told)


@needs_compiler
def test_one_that_does_not_fit_is_in_the_table_with_a_remedy_and_exits_with_4(apart, capsys):
    with pytest.raises(SystemExit) as stopped:
        started("--rows", "65536", "--mesh", "data=2,fsdp=2")
    told = capsys.readouterr()
    assert stopped.value.code == 4 and told.err.count("\n") == 1
    assert re.match(r"does not fit: sft: step holds [\d.]+ of 15.75 GiB$", told.err.strip())
    line = next(line for line in told.out.splitlines() if line.startswith("| sft: step"))
    assert float(line.split("|")[4]) > 15.75
    assert "sft: step does not fit: its temporaries take" in told.out
    assert "micro_batches up to 16384 times as many" in told.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plan", "v5x:2x2"], "did you mean v5e:2x2?"),
        (["--plan", "v5e:2x2", "--mesh", "fsdp=3"], "needs 3 devices, but there are 4"),
        (["--plan", "v5e:2x2", "--rows", "6"], "batch_size=6 does not divide over data x fsdp = 4"),
    ],
)
@needs_compiler
def test_bad_input_is_one_line(apart, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        launch.launch(run, Toy(), flags, programs=programs)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_an_experiment_that_lists_no_programs_says_so(apart, capsys):
    with pytest.raises(SystemExit) as stopped:
        launch.launch(run, Toy(), ["--plan", "v5e:2x2"])
    assert stopped.value.code == 2 and "does not list its programs" in capsys.readouterr().err


def test_remedies_name_what_takes_most():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    where = sharding.replicated(mesh)

    def held(size):
        return {"weights": {"kernel": jax.ShapeDtypeStruct((size,), jnp.float32, sharding=where)}}

    state = {"opt_state": held(3 * GIB // 4), "trainable": held(3 * GIB // 8)}

    def told(rows, alone, frozen=0):
        arguments = (state, {"reference": held(frozen * GIB // 4)})
        program = Program("x", jnp.sin, arguments, (), rows)
        return plan.remedies(plan.Row(program, alone * GIB, 0.0, None, 0.0), mesh)

    first, *others = told(rows=32, alone=20.0)
    assert "micro_batches up to 4 times as many" in first and "15.50 GiB" in first
    assert "one row per device" in told(rows=8, alone=20.0)[0]
    first, *others = told(rows=8, alone=5.0)
    assert "the optimizer's moments take 3.00 GiB: LoRA" == first
    assert any("fsdp instead" in text for text in others)
    assert "frozen float32 models take 8.00 GiB: bfloat16" == told(8, 13.0, frozen=8)[0]
    assert told(8, 5.0)[-1] == "or a larger slice"


def test_bytes_on_a_device_are_those_of_its_part():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    model = abstract.model(SHAPE, mesh)
    placed = sharding.initialise(mesh, transformer.init, SHAPE, jax.random.key(0), static_argnums=0)
    one = jax.tree.map(lambda x: x.addressable_shards[0].data.nbytes, placed)
    assert jax.tree.leaves(one) == [sharding.device_bytes(x) for x in jax.tree.leaves(model)]
    assert np.sum(jax.tree.leaves(one)) == size_of(model)
