"""LoRA: what is trained, what is shared, and what the adapter computes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny

from rlhf_jax.algorithms import ppo, reward_model, sft
from rlhf_jax.models import heads, huggingface, lora, transformer
from rlhf_jax.models.partition import combine, partition
from rlhf_jax.rewards import learned
from rlhf_jax.training.checkpoint import Checkpoints

pytestmark = [
    pytest.mark.usefixtures("compile_cache"),
    # peft 0.21 asks transformers 5.23 in a way that it warns about.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
CONFIG = lora.Config(rank=2, alpha=6.0)
TOKENS = jnp.arange(12).reshape(2, 6) + 60
ATTEND = jnp.array([[1] * 6, [0, 0, 1, 1, 1, 1]])


def logits(model):
    return transformer.logits(model, transformer.hidden_states(model, TOKENS, ATTEND))


def noisy(model, scale=0.3):
    def noise(path, x):
        key = jax.random.key(len(jax.tree_util.keystr(path)))
        return x + scale * jax.random.normal(key, x.shape) if path[-1].key == "lora_b" else x

    return jax.tree.map_with_path(noise, model)


def attached(config=CONFIG, scale=0.0):
    """A tiny model with an adapter whose B is `scale` times noise."""
    return noisy(lora.attach(tiny.model(), config, jax.random.key(1)), scale)


def leaves(model):
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(model)}


def frozen_part(model):
    return partition({"m": model})[1]["m"]


def base_of(model):
    return leaves(frozen_part(model))


def buffers(tree):
    """Address and bytes of every buffer of a tree, or of all live arrays: aliases count once."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    shards = [s.data for x in arrays for s in x.addressable_shards]
    return {x.unsafe_buffer_pointer(): x.nbytes for x in shards}


def test_a_fresh_adapter_changes_nothing_and_shares_the_base():
    model = tiny.model()
    with_adapter = lora.attach(model, CONFIG, jax.random.key(1))
    np.testing.assert_array_equal(logits(with_adapter), logits(model))
    assert buffers(model).keys() <= buffers(with_adapter).keys()


def test_each_kernel_becomes_w_plus_alpha_over_rank_a_b():
    model = attached(scale=0.3)
    node = model.weights["layer_0"]["mlp"]["up"]
    merged = lora.merge(model)
    by_hand = np.asarray(node["kernel"]) + 3.0 * np.asarray(node["lora_a"]) @ node["lora_b"]
    np.testing.assert_allclose(merged.weights["layer_0"]["mlp"]["up"]["kernel"], by_hand, atol=1e-7)
    assert jax.tree.structure(merged) == jax.tree.structure(tiny.model())
    np.testing.assert_allclose(logits(model), logits(merged), atol=2e-5)
    assert np.abs(logits(model) - logits(tiny.model())).max() > 0.1


def test_only_the_targets_get_an_adapter():
    model = attached(lora.Config(rank=3, targets=("query", "value")))
    names = {name for name in leaves(model) if "lora_a" in name}
    assert len(names) == 2 and all("query" in name or "value" in name for name in names)


PLAIN_SHAPE = dict(vocab_size=264, num_layers=2, d_model=32, num_heads=4, d_ff=64, max_length=32)
GPT2 = transformer.Config(
    positions="learned", norm="layer", gated=False, qkv_bias=True, out_bias=True, mlp_bias=True,
    activation="gelu_tanh", tied=True, **PLAIN_SHAPE
)  # fmt: skip
NEOX = transformer.Config(
    norm="layer", gated=False, parallel=True, mlp_bias=True, tied=False, **PLAIN_SHAPE
)


@pytest.mark.parametrize("shape", [tiny.model().config, GPT2, NEOX])
def test_without_named_targets_every_kernel_of_the_layers_that_there_is_gets_one(shape):
    model = transformer.init(shape, jax.random.key(0))
    model = transformer.with_score_head(model, jax.random.key(2))
    adapted = noisy(lora.attach(model, lora.Config(rank=2), jax.random.key(1)))
    names = {name for name in leaves(adapted) if "lora_a" in name}
    kernels = {n for n in leaves(model) if "kernel" in n and "layer_" in n}
    assert names == {n.replace("kernel", "lora_a") for n in kernels}
    assert np.abs(logits(adapted) - logits(model)).max() > 0.1
    np.testing.assert_allclose(logits(adapted), logits(lora.merge(adapted)), atol=1e-4)


def test_parts_combine_to_the_whole_and_a_model_without_adapter_is_trained_whole():
    models = {"policy": attached(), "critic": tiny.model()}
    trainable, frozen = partition(models)
    assert frozen.keys() == {"policy"} and trainable["critic"] is models["critic"]
    combined = combine(frozen | {"reference": models["critic"]}, trainable)
    assert combined.pop("reference") is models["critic"]
    assert jax.tree.structure(combined) == jax.tree.structure(models)
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, combined, models))
    assert sum(x.size for x in jax.tree.leaves(trainable["policy"])) == sum(
        2 * (a + b) for a, b in [(32, 32)] * 4 + [(32, 64)] * 2 + [(64, 32)]
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"alpha": 0}, "alpha=0.0 must be above 0"),
        ({"targets": ("query", "qkv")}, r"targets=\['qkv'\]"),
        ({"targets": ("query", "score")}, r"targets=\['score'\]"),
        ({"targets": ("query", "head")}, r"targets=\['head'\]"),  # never read there
    ],
)
def test_bad_adapters_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        lora.attach(tiny.model(), lora.Config(**fields), jax.random.key(0))


def test_an_adapter_on_an_adapter_is_refused():
    with pytest.raises(ValueError, match="has an adapter already"):
        lora.attach(attached(), CONFIG, jax.random.key(0))


@pytest.mark.parametrize("mesh", ["1x1x1", "1x2x4"])
def test_training_moves_the_adapter_and_leaves_the_base_alone(mesh):
    policy = lora.attach(tiny.model(mesh), CONFIG, jax.random.key(1))
    where = tiny.runtime(mesh)
    tuned = sft.run(tiny.SFT, policy, tiny.demonstrations(), runtime=where).policy
    scorer = reward_model.run(tiny.REWARD_MODEL, tuned, tiny.comparisons(), runtime=where).scorer
    for model in (tuned, scorer):
        before, after = base_of(policy), base_of(model)
        assert after.keys() <= before.keys()
        assert all(np.array_equal(before[name], after[name]) for name in after)
    moved = {n for n, x in leaves(tuned).items() if not np.array_equal(x, leaves(policy)[n])}
    assert len([n for n in moved if "lora_b" in n]) == 7


def run_ppo(policy, scorer, config=tiny.PPO, checkpoints=None, **kwargs):
    return ppo.run(
        config,
        policy=policy,
        score=learned.score,
        scorer=scorer,
        critic=scorer,
        prompts=tiny.prompts(),
        tokenizer=tiny.TOKENIZER,
        runtime=tiny.runtime(checkpoints=checkpoints),
        **kwargs,
    )


def scorer_on(policy):
    return heads.init_scorer(policy, jax.random.key(3))


def test_ppo_holds_one_copy_of_the_base():
    """Policy, reference, reward model and critic: their kernels are the same buffers."""
    policy = attached()
    scorer = scorer_on(policy)
    base = sum(buffers(frozen_part(policy)).values())
    before = sum(buffers(jax.live_arrays()).values())
    peak = []

    def observe(rollout):
        peak.append(sum(buffers(jax.live_arrays()).values()))
        return {}

    result = run_ppo(policy, scorer, observe=observe)
    # Two adapters with two Adam moments each, a head, and some batches: less than half a base.
    assert max(peak) - before < 0.5 * base
    assert buffers(frozen_part(result.policy)).keys() <= buffers(policy).keys()
    assert buffers(frozen_part(result.critic)).keys() <= buffers(policy).keys()


def test_an_interrupted_run_with_adapters_ends_with_the_same_bits(tmp_path):
    policy = attached()
    whole = run_ppo(policy, scorer_on(policy))
    short = dataclasses.replace(tiny.PPO, num_iterations=2)
    with Checkpoints(tmp_path) as checkpoints:
        # The schedule is constant, so the first two iterations do not know how many will follow.
        run_ppo(policy, scorer_on(policy), short, checkpoints=checkpoints)
        resumed = run_ppo(policy, scorer_on(policy), checkpoints=checkpoints)
    for name, x in leaves(whole.policy).items():
        np.testing.assert_array_equal(leaves(resumed.policy)[name], x, err_msg=name)
    assert len(resumed.history) == 2


def llama_folder(tmp_path):
    """A random Llama as transformers writes it, and ours of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    config.pad_token_id = 0  # by which transformers finds the last token
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base", huggingface.load(tmp_path / "base")


def theirs(folder):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.no_grad():
        return model(torch.tensor(np.asarray(TOKENS)[:1])).logits[0].numpy()


@pytest.mark.parametrize("targets", [CONFIG.targets, ("query", "down")])
def test_peft_reads_an_adapter_of_ours(tmp_path, targets):
    pytest.importorskip("peft")
    folder, base = llama_folder(tmp_path)
    config = lora.Config(rank=3, alpha=6.0, targets=targets)
    model = noisy(lora.attach(base, config, jax.random.key(0)))
    huggingface.save_adapter(tmp_path / "adapter", model, like=folder)
    np.testing.assert_allclose(logits(model)[0], theirs(tmp_path), atol=1e-4)
    again = huggingface.load_adapter(tmp_path / "adapter", base, like=folder)
    for name, x in leaves(model).items():
        np.testing.assert_array_equal(leaves(again)[name], x, err_msg=name)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of EVA's missing step
@pytest.mark.parametrize(
    ("init", "rslora"),
    [(True, False), (True, True), ("orthogonal", False), ("eva", False), ("mica", False)],
)
def test_an_adapter_of_peft_is_read(tmp_path, init, rslora):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder, base = llama_folder(tmp_path)
    wrapped = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        peft.LoraConfig(
            r=4,
            lora_alpha=10,
            target_modules=["q_proj", "up_proj"],
            init_lora_weights=init,
            use_rslora=rslora,
        ),
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    model = huggingface.load_adapter(tmp_path / "adapter", base, like=folder)
    np.testing.assert_allclose(logits(model)[0], theirs(tmp_path), atol=1e-4)
    assert np.abs(logits(model) - logits(base)).max() > 0.1
    assert not lora.has_adapter(base)


def their_scores(folder, adapter):
    """Of TOKENS, by peft's adapter on transformers' classifier of one label."""
    import torch

    model = adapter(their_classifier(folder)).eval()
    with torch.no_grad():
        rows = [
            model(torch.tensor(np.asarray(x[m > 0]))[None]).logits[0]
            for x, m in zip(TOKENS, ATTEND)
        ]
    return np.concatenate(rows)


def their_classifier(folder):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)


def test_peft_reads_a_scorers_adapter_of_ours_with_its_head(tmp_path):
    peft = pytest.importorskip("peft")
    pytest.importorskip("torch")
    folder, base = llama_folder(tmp_path)
    both = noisy(lora.attach(base, CONFIG, jax.random.key(0)))
    both = transformer.with_score_head(both, jax.random.key(1))
    with pytest.raises(ValueError, match="say head='lm' or 'score'"):
        huggingface.save_adapter(tmp_path / "x", both, like=folder)
    scorer = transformer.without_lm_head(both)
    huggingface.save_adapter(tmp_path / "adapter", scorer, like=folder)
    want = heads.sequence_scores(scorer, TOKENS, ATTEND)
    got = their_scores(
        tmp_path, lambda base: peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    )
    np.testing.assert_allclose(want, got, atol=1e-4)
    assert np.abs(want - heads.sequence_scores(both, TOKENS[::-1], ATTEND)).max() > 0.1
    # The language model it was trained from becomes the scorer; one that has both heads keeps both.
    for start in (base, transformer.with_score_head(base, None)):
        again = huggingface.load_adapter(tmp_path / "adapter", start, like=folder)
        assert ("head" in again.weights) == ("score" in start.weights)
        for name, x in leaves(scorer).items():
            np.testing.assert_array_equal(leaves(again)[name], x, err_msg=name)
    assert "score" not in base.weights
    shifted = {**scorer.weights, "score": scorer.weights["score"] | {"bias": jnp.ones(1)}}
    with pytest.raises(ValueError, match="bias is 1, .*without_score_bias"):
        huggingface.save_adapter(
            tmp_path / "x", transformer.Model(scorer.config, shifted), like=folder
        )
    record = tmp_path / "adapter" / "adapter_config.json"
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors.pop("base_model.model.score.weight")
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match="score.weight is missing, but task_type is SEQ_CLS"):
        huggingface.load_adapter(record.parent, base, like=folder)


def test_a_scorers_adapter_of_peft_is_read_with_its_head(tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    folder, base = llama_folder(tmp_path)
    targets = ["q_proj", "up_proj"]
    wrapped = peft.get_peft_model(
        their_classifier(tmp_path),
        peft.LoraConfig(r=4, lora_alpha=10, target_modules=targets, task_type="SEQ_CLS"),
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    scorer = huggingface.load_adapter(tmp_path / "adapter", base, like=folder)
    got = heads.sequence_scores(scorer, TOKENS, ATTEND)
    np.testing.assert_allclose(got, their_scores(tmp_path, lambda base: wrapped), atol=1e-4)
    assert np.abs(got).max() > 0.1 and "head" not in scorer.weights


VARIANTS = ("kasa_config", "use_bdlora", "velora_config", "monteclora_config", "arrow_config")


def test_adapters_that_are_not_plain_lora_are_refused(tmp_path):
    pytest.importorskip("torch")
    folder, base = llama_folder(tmp_path)
    with pytest.raises(ValueError, match="the model has no adapter"):
        huggingface.save_adapter(tmp_path / "x", base, like=folder)
    adapter = tmp_path / "adapter"
    model = lora.attach(base, CONFIG, jax.random.key(0))
    huggingface.save_adapter(adapter, model, like=folder)
    record = adapter / "adapter_config.json"
    plain = json.loads(record.read_text())
    for change, message in (
        ({"use_dora": True}, "use_dora=True is not plain LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not plain LoRA"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga' is not plain LoRA"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication=.* is not plain LoRA"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern=.* is not plain LoRA"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=.* is not plain LoRA"),
        *(({name: {}}, f"{name}={{}} is not plain LoRA") for name in VARIANTS),
        ({"use_what_comes_next": True}, "use_what_comes_next=True is not plain LoRA"),
        ({"lora_alpha": None}, "lora_alpha=None must be a positive number"),
        ({"r": 3}, r"q_proj.lora_A.weight has shape \(2, 32\)"),
    ):
        record.write_text(json.dumps(plain | change))
        with pytest.raises(ValueError, match=message):
            huggingface.load_adapter(adapter, base, like=folder)
    record.write_text(json.dumps(plain))
    with pytest.raises(ValueError, match="has an adapter already"):
        huggingface.load_adapter(adapter, model, like=folder)
    with pytest.raises(ValueError, match="save lora.merge"):
        huggingface.save(tmp_path / "whole", model, like=folder)
    tensors = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    for kept, message in ((tensors, "one of lora_A and lora_B"), ({}, "holds no adapter")):
        safetensors.numpy.save_file(kept, adapter / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            huggingface.load_adapter(adapter, base, like=folder)
    (adapter / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com")
    with pytest.raises(ValueError, match="adapter_model.safetensors: damaged or not a safetensors"):
        huggingface.load_adapter(adapter, base, like=folder)
    record.unlink()
    with pytest.raises(ValueError, match="holds no adapter_config.json"):
        huggingface.load_adapter(adapter, base, like=folder)
