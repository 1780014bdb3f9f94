"""Model FLOPs: against a count by hand, brute force over positions, and the compiler's analysis."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import chips
from rlhf_jax.algorithms import sft
from rlhf_jax.models import flops, lora, partition, transformer
from rlhf_jax.training.speed import Speed

SHAPE = transformer.Config(
    vocab_size=32, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16
)


def by_hand(length):
    """FLOPs of a forward pass of SHAPE over a row, product by product, without logits."""
    total = 0
    for position in range(length):
        products = [(8, 8), (8, 4), (8, 4), (8, 8), (8, 16), (8, 16), (16, 8)]
        total += sum(2 * n * m for n, m in products)  # query, key, value, out, gate, up, down
        seen = position + 1
        total += 2 * (2 * seen * 2 * 4)  # scores and mixing: 2 heads of 4 with `seen` columns
    return total


LOGITS = 2 * 8 * 32  # FLOPs of one token's


def model(shape=SHAPE, scored=False):
    made = jax.eval_shape(lambda: transformer.init(shape, jax.random.key(0)))
    if scored:
        make = functools.partial(transformer.with_score_head, key=None)
        return jax.eval_shape(make, transformer.without_lm_head(made))
    return made


def test_a_forward_pass_costs_its_products_counted_one_by_one():
    row = flops.forward(SHAPE, 5, flops.attended_in_row(SHAPE, 0, 5), logits=3)
    assert row == by_hand(5) + 3 * LOGITS


def test_per_token_it_is_twice_the_weights_and_the_attention_and_three_times_that_in_training():
    weights = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 8 * 32
    attention = 4 * 2 * 4 * np.mean([1, 2, 3, 4, 5])
    assert flops.per_token(SHAPE, 5) == 2 * weights + attention
    assert flops.per_token(SHAPE, 5, training=True) == 6 * weights + 3 * attention


def test_documents_padding_and_windows_are_counted_as_the_mask_has_them():
    shape = transformer.Config(num_layers=3, window=2, full_layers=(1,))
    attend = np.array([[1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    steps = np.arange(6)
    same = (attend[:, :, None] == attend[:, None]) & (attend[:, :, None] > 0)
    causal = same & (steps[:, None] >= steps)
    local = causal & (steps[:, None] - steps < 2)
    expected = causal.sum() + 2 * local.sum()
    assert flops.attended_in_rows(shape, jnp.asarray(attend)) == expected
    whole = jnp.ones((1, 6), jnp.int32)
    assert flops.attended_in_row(shape, 0, 6) == flops.attended_in_rows(shape, whole)
    parts = flops.attended_in_row(shape, 0, 4) + flops.attended_in_row(shape, 4, 6)
    assert parts == flops.attended_in_row(shape, 0, 6)


def test_an_update_is_three_passes_of_a_trained_model_and_one_of_a_frozen_one():
    attend = jnp.asarray([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    row = by_hand(5) + by_hand(3) + 8 * LOGITS
    assert flops.of_update({"policy": model()}, {}, attend) == 3 * row
    assert flops.of_update({"policy": model()}, {"reference": model()}, attend) == 4 * row
    scorer = {"scorer": model(scored=True)}
    assert flops.of_update(scorer, {}, attend[:, None]) == 3 * (row - 8 * LOGITS)


def test_a_frozen_base_passes_the_gradient_on_and_has_none_of_its_own():
    adapted = lora.attach(tiny.model(), lora.Config(rank=2), jax.random.key(0))
    attend = jnp.ones((2, 7), jnp.int32)
    trainable, frozen = partition.partition({"policy": adapted})
    whole = flops.of_update({"policy": tiny.model()}, {}, attend)
    assert flops.of_update(trainable, frozen, attend) == pytest.approx(whole * 2 / 3)


def test_an_iteration_is_sampling_a_reading_by_every_model_and_the_epochs_of_the_trained_ones():
    attend = jnp.asarray([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    trunk, sampled = 2 * by_hand(4), 3 * LOGITS
    policy, critic = model(), model(scored=True)
    frozen = {"reference": policy, "scorer": critic}
    rows = {"sampled": attend, "trained": attend, "start": 3, "samples": 1}
    found = flops.of_iteration({"policy": policy, "critic": critic}, frozen, **rows, num_epochs=4)
    passes_of_policy, passes_of_critic = 1 + 1 + 4 * 3, 1 + 4 * 3
    expected = (passes_of_policy + 1) * (trunk + sampled) + (passes_of_critic + 1) * trunk
    assert found == pytest.approx(expected, rel=1e-6)
    # A reward that is no model costs no model FLOPs.
    other = flops.of_iteration({"policy": policy}, {"scorer": {"w": 1.0}}, **rows, num_epochs=1)
    assert other == (1 + 1 + 3) * (trunk + sampled)


def test_a_prompt_of_several_samples_is_read_once_and_only_what_is_trained_on_is_updated():
    attend = jnp.asarray([[0, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    found = flops.of_iteration(
        {"policy": model()},
        {},
        sampled=attend,
        trained=attend[:1, None],
        start=3,
        samples=2,
        num_epochs=2,
    )
    rows = by_hand(4) + by_hand(3) + 3 * LOGITS
    assert found == 2 * rows - by_hand(2) + 2 * 3 * (by_hand(4) + 2 * LOGITS)


def test_the_compiler_counts_the_same_and_what_is_no_product_besides():
    """XLA computes the masked half of attention too, so every token attends to the whole row."""
    shape = transformer.Config(vocab_size=512, num_layers=1, d_model=128, d_ff=352, head_dim=32)
    rows, length = 4, 16
    tokens = jnp.ones((rows, length), jnp.int32)

    def loss(model):
        hidden = transformer.hidden_states(model, tokens, tokens)
        return jnp.sum(transformer.logits(model, hidden))

    def by_xla(program):
        quick = {"xla_backend_optimization_level": 0}
        compiled = jax.jit(program, compiler_options=quick).lower(model(shape)).compile()
        return compiled.cost_analysis()["flops"]

    forward = flops.forward(shape, rows * length, rows * length * length, rows * length)
    # The rest is norms, rotary angles, softmax and activations.
    assert 1.0 < by_xla(loss) / forward < 1.06
    assert 1.0 < by_xla(jax.value_and_grad(loss)) / (3 * forward) < 1.06


class Device:
    """Stands in for an accelerator."""

    platform, device_kind, process_index = "gpu", "NVIDIA H100 80GB HBM3", 0

    def __init__(self, peak):
        self.peak = peak

    def memory_stats(self):
        return {"peak_bytes_in_use": self.peak}


def test_a_device_is_found_by_the_longest_kind_that_its_name_begins_with(no_shape_checks):
    assert chips.find("NVIDIA H100 80GB HBM3").flops == 989.5e12
    assert chips.find("NVIDIA H100 PCIe").flops == 756.5e12
    assert chips.find("TPU v5 lite").flops == 197e12 and chips.find("TPU v5p").flops == 459e12
    assert chips.find("a new chip") is None
    assert chips.peak_flops([Device(0), Device(0)]) == 2 * 989.5e12


def test_virtual_devices_share_the_measured_rate_of_the_cpu():
    one, eight = chips.peak_flops(jax.devices()[:1]), chips.peak_flops(jax.devices())
    assert one == eight > 1e8
    assert chips.copy_rate(1) > 1e7


def test_a_step_tells_its_speed_per_device_and_the_fullest_memory(no_shape_checks):
    speed = Speed(0.0, [Device(2**30), Device(3 * 2**30)], peak=1000.0)
    assert speed.add(60.0, tokens=10, flops=100) == {} and speed.utilisation is None
    assert speed.add(62.0, tokens=10, flops=100) == {
        "tokens_per_second": 5.0,
        "tokens_per_second_per_device": 2.5,
        "model_flops_utilisation": 0.05,
        "device_memory_gib": 3.0,
    }
    speed.add(63.0, tokens=10, flops=500)
    assert speed.utilisation == pytest.approx(600 / 3 / 1000)


def test_training_reports_its_model_flops_and_their_share_of_the_machines_rate():
    result = sft.run(
        tiny.SFT, tiny.model("8x1x1"), tiny.demonstrations(), runtime=tiny.runtime("8x1x1")
    )
    batches = list(itertools.islice(tiny.demonstrations().from_position(0), 6))
    for line, batch in zip(result.history, batches):
        whole = flops.of_update({"policy": tiny.model()}, {}, jnp.asarray(batch.attend))
        assert line["model_flops"] == whole
    assert "model_flops_utilisation" not in result.history[0]
    line, tokens = result.history[1], float(np.sum(batches[1].attend > 0))
    seconds = tokens / line["tokens_per_second"]
    share = line["model_flops"] / seconds / chips.peak_flops(jax.devices())
    assert line["model_flops_utilisation"] == pytest.approx(share)
    assert line["tokens_per_second_per_device"] == line["tokens_per_second"] / 8
    assert "device_memory_gib" not in line  # CPUs do not tell


def test_a_model_of_eight_billion_weights_does_not_overflow():
    shape = transformer.Config(
        vocab_size=128256,
        num_layers=32,
        d_model=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        d_ff=14336,
    )
    trained = {"policy": jax.eval_shape(lambda: transformer.init(shape, jax.random.key(0)))}
    attend = jnp.ones((1, 2048), jnp.int32)
    # 8.03 billion weights less the embedding's 0.53, 6 for each token, and 4 per feature of a
    # query head and attended token, three times.
    products = 6 * 2048 * (8.03e9 - 128256 * 4096)
    pairs = 3 * 4 * 32 * 4096 * 2048 * 2049 / 2
    found = jax.jit(lambda attend: flops.of_update(trained, {}, attend))(attend)
    assert float(found) == pytest.approx(products + pairs, rel=2e-3)
