"""Every family of models against transformers on torch: logits, greedy decoding, export, scores."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_huggingface import left_padded, refused

from rlhf_jax import losses, sampling, sharding
from rlhf_jax.data.records import Ends
from rlhf_jax.models import heads, huggingface, transformer
from rlhf_jax.models.huggingface import configurations, families

# save_pretrained reads config.json back without closing it (transformers 5.23).
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

# What is compiled here runs once: optimising it would be most of the time.
compile_quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
init = compile_quickly(transformer.init, static_argnums=0)


@compile_quickly
def forward(model, tokens, attend):
    return transformer.logits(model, transformer.hidden_states(model, tokens, attend))


SMALL = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=32, intermediate_size=24)  # fmt: skip
GPT2 = dict(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32)
GROUPED = SMALL | dict(num_key_value_heads=2)
GEMMA = GROUPED | dict(head_dim=8, pad_token_id=0)
FOUR_LAYERS = dict(num_hidden_layers=4, sliding_window=3)
PHI3 = GROUPED | dict(pad_token_id=0, eos_token_id=None)


def scaled(kind, **numbers):
    """In the spelling of transformers 4, which 5 reads and writes as its own."""
    return {"rope_theta": 100.0, "rope_scaling": {"rope_type": kind, **numbers}}


YARN = dict(factor=4.0, original_max_position_embeddings=8)
CASES = {
    "Llama, biases": ("Llama", GROUPED | dict(attention_bias=True, mlp_bias=True)),
    "Llama, one key head, wide heads, tied": (
        "Llama", SMALL | dict(num_key_value_heads=1, head_dim=10, tie_word_embeddings=True)
    ),
    "Llama, rope of its own": ("Llama", GROUPED | dict(head_dim=16, rope_theta=500.0)),
    "Llama, linear rope": ("Llama", GROUPED | scaled("linear", factor=4.0)),
    "Llama, dynamic rope": ("Llama", GROUPED | scaled("dynamic", factor=4.0)),
    "Llama, llama3 rope": ("Llama", GROUPED | dict(head_dim=16) | scaled(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16,
    )),
    "Llama, yarn rope": ("Llama", GROUPED | dict(head_dim=16) | scaled("yarn", **YARN)),
    "Llama, yarn rope, every option": ("Llama", GROUPED | dict(head_dim=16) | scaled(
        "yarn", beta_fast=4.0, beta_slow=0.5, truncate=False, mscale=0.7, mscale_all_dim=0.4,
        **YARN,
    )),
    "Mistral, window": ("Mistral", GROUPED | dict(sliding_window=3)),
    "Mistral, no window": ("Mistral", GROUPED | dict(sliding_window=None)),
    "Ministral, layers of both kinds": ("Ministral", GROUPED | dict(
        head_dim=4, sliding_window=3, layer_types=["full_attention", "sliding_attention"]
    )),
    "Qwen2": ("Qwen2", GROUPED | dict(tie_word_embeddings=True)),
    "Qwen2, later layers windowed": (
        "Qwen2", GROUPED | dict(sliding_window=3, use_sliding_window=True, max_window_layers=1)
    ),
    "Qwen3": ("Qwen3", GROUPED | dict(head_dim=8)),
    "GPT2": ("GPT2", GPT2),
    "GPT2, exact gelu, narrow, untied": (
        "GPT2", GPT2 | dict(activation_function="gelu", n_inner=24, tie_word_embeddings=False)
    ),
    "Gemma": ("Gemma", GEMMA),
    "Gemma2": ("Gemma2", GEMMA | dict(sliding_window=3, query_pre_attn_scalar=5)
               | dict(final_logit_softcapping=2.0, attn_logit_softcapping=1.5)),
    "Gemma2, no caps": ("Gemma2", GEMMA | FOUR_LAYERS
                        | dict(final_logit_softcapping=None, attn_logit_softcapping=None)),
    "Gemma3": ("Gemma3Text", GEMMA | FOUR_LAYERS | scaled("linear", factor=8.0) | dict(
        rope_theta=1000.0, rope_local_base_freq=50.0,
        layer_types=["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
    )),
    "Gemma3, seven layers": ("Gemma3Text", GEMMA | dict(num_hidden_layers=7, sliding_window=2)),
    "Phi3, window": ("Phi3", PHI3 | dict(sliding_window=4)),
    "Phi3, part of the head turns": ("Phi3", PHI3 | dict(partial_rotary_factor=0.5)),
    "Phi3, longrope": ("Phi3", PHI3 | dict(original_max_position_embeddings=24, rope_scaling={
        "type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.0, 4.0]
    })),
    "GPTNeoX": ("GPTNeoX", SMALL | dict(hidden_size=32)),
    "GPTNeoX, one after the other": ("GPTNeoX", SMALL | dict(
        use_parallel_residual=False, attention_bias=False, rotary_pct=1.0, rotary_emb_base=100
    )),
    "OPT": ("OPT", dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, ffn_dim=24,
                        num_attention_heads=4, max_position_embeddings=32)),
}  # fmt: skip


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def random_model(transformers, case, kind, **fields):
    """Their model, all of whose parameters are random, and make logits of order 1."""
    import torch

    torch.manual_seed(0)
    name, options = CASES[case]
    if not hasattr(transformers, f"{name.removesuffix('Text')}Config"):
        pytest.skip(f"these transformers have no {name}")
    name, options = name.removesuffix("Text"), {"eos_token_id": None} | options | fields
    suffix = "Text" if name == "Gemma3" else ""
    if kind == "CausalLM" and name == "GPT2":
        kind = "LMHeadModel"
    scorer = f"{name}{suffix}For{kind}" if kind == "SequenceClassification" else None
    # Fused attention has no soft cap: transformers 4 would leave it out.
    config = getattr(transformers, f"{name}{suffix}Config")(attn_implementation="eager", **options)
    causal = f"{name}{kind}" if kind == "LMHeadModel" else f"{name}For{kind}"
    model = getattr(transformers, scorer or causal)(config).eval()
    plus_one = name.startswith("Gemma")
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if "norm" in key or ".ln_" in key:
                tensor.uniform_(-0.5, 0.5)
                tensor.add_(0 if plus_one or key.endswith("bias") else 1)
            elif tensor.ndim == 1:
                tensor.normal_(0, 0.3)
            else:
                tensor.normal_(0, 0.1 if plus_one and "embed" in key else 0.3)
    return model


def prompts():
    rng = np.random.default_rng(0)
    return left_padded([rng.integers(1, 40, n) for n in (9, 5, 2, 1)], 9)


def said(theirs, tokens, attend):
    """Their logits [B, T, V]."""
    import torch

    ids, mask = torch.tensor(np.asarray(tokens)).long(), torch.tensor(np.asarray(attend)).long()
    with torch.no_grad():
        places = {"position_ids": mask.cumsum(1) - mask}
        return theirs(input_ids=ids, attention_mask=mask, **places).logits.numpy()


def continued(model, tokens, attend, new, eos=39):
    greedy = compile_quickly(
        lambda model: sampling.sample(
            model,
            tokens,
            attend,
            sampling.row_keys(jax.random.key(0), jnp.arange(len(tokens))),
            sampling=sampling.Sampling(max_new_tokens=new),
            ends=Ends((eos,), 0),
            choose=sampling.greedy,
        )
    )
    return greedy(model)


def same_state(left, right):
    """Same keys, dtypes and values."""
    left, right = left.state_dict(), right.state_dict()
    assert list(left) == list(right)
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype, key
        np.testing.assert_array_equal(tensor.float().numpy(), right[key].float().numpy(), key)


def configuration(model):
    fields = model.config.to_dict()
    return {k: v for k, v in fields.items() if k not in ("_name_or_path", "transformers_version")}


@pytest.mark.parametrize("case", CASES)
def test_logits_greedy_decoding_and_export_are_those_of_torch(case, tmp_path, transformers):
    import torch

    theirs = random_model(transformers, case, "CausalLM")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = huggingface.load(tmp_path / "theirs")
    tokens, attend = prompts()
    want, real = said(theirs, tokens, attend), np.asarray(attend) > 0
    assert np.abs(want[real]).max() > 1
    np.testing.assert_allclose(forward(ours, tokens, attend)[real], want[real], atol=1e-4)

    ids, mask = torch.tensor(np.asarray(tokens)).long(), torch.tensor(np.asarray(attend)).long()
    generate = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    chosen = theirs.generate(ids, eos_token_id=39, **generate).numpy()
    got = continued(ours, tokens, attend, 12)
    np.testing.assert_array_equal(got.tokens[:, : chosen.shape[1]], chosen)

    huggingface.save(tmp_path / "ours", ours, like=tmp_path / "theirs")
    back = type(theirs).from_pretrained(tmp_path / "ours").eval()
    same_state(back, theirs)
    assert configuration(back) == configuration(theirs)

    huggingface.save(tmp_path / "new", ours)  # its options alone describe it
    new = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", attn_implementation="eager"
    ).eval()
    np.testing.assert_allclose(said(new, tokens, attend)[real], want[real], atol=1e-4)
    again = huggingface.load(tmp_path / "new")
    assert again.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, again.weights, ours.weights)


# --- config.json edited by hand -------------------------------------------------------------------

EDITED = {
    "rope_scaling replaces rope_parameters, whose base is lost": (
        "Llama, rope of its own", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    ),
    "rope_scaling with the base beside it": ("Llama, rope of its own", {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 77.0
    }),
    "rope_scaling with the base in it": ("Llama, rope of its own", {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5.0},
        "rope_theta": 77.0,
    }),
    "an empty rope_scaling replaces nothing": ("Llama, rope of its own", {"rope_scaling": {}}),
    "the trained length beside rope_scaling is the one": ("Llama, rope of its own", {
        "rope_scaling": {"rope_type": "yarn", **YARN}, "original_max_position_embeddings": 4
    }),
    "GPTNeoX, rope_scaling with base and share beside it": ("GPTNeoX", {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rotary_emb_base": 50.0,
        "rotary_pct": 0.5,
    }),
    "Phi3, rope_scaling beside a share": ("Phi3, part of the head turns", {
        "rope_scaling": {"rope_type": "longrope", "short_factor": [2.0], "long_factor": [4.0]},
    }),
    "Gemma3, rope_scaling changes fields of full attention": (
        "Gemma3", {"rope_scaling": {"factor": 2.0}, "rope_theta": 5.0}
    ),
    "Gemma3, flat rope_parameters are passed over": (
        "Gemma3", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 5.0}
    ),
    "Mistral, every layer sees all": (
        "Mistral, window", {"layer_types": ["full_attention"] * 2}
    ),
    "Mistral, every layer has a window": (
        "Mistral, window", {"layer_types": ["sliding_attention"] * 2}
    ),
    "Mistral, layers of both kinds": (
        "Mistral, window", {"layer_types": ["full_attention", "sliding_attention"]}
    ),
    "Mistral, layer_types of null": ("Mistral, window", {"layer_types": None}),
    "Gemma, gelu is the approximation": ("Gemma", {"hidden_act": "gelu"}),
    "Gemma2, gelu is gelu": ("Gemma2", {"hidden_activation": "gelu"}),
    "Gemma3, gelu is gelu": ("Gemma3", {"hidden_activation": "gelu"}),
    "Gemma2, no pattern is read": (
        "Gemma2, no caps", {"sliding_window_pattern": 4, "layer_types": None}
    ),
    "Gemma3, a pattern is read": ("Gemma3", {"sliding_window_pattern": 2, "layer_types": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITED)
def test_an_edited_configuration_is_read_as_by_the_auto_classes(name, tmp_path, transformers):
    if transformers.__version__ < "5":
        pytest.skip("the rules are those of transformers 5")
    case, change = EDITED[name]
    random_model(transformers, case, "CausalLM").save_pretrained(tmp_path / "theirs")
    record = tmp_path / "theirs" / "config.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    auto = functools.partial(
        transformers.AutoModelForCausalLM.from_pretrained, attn_implementation="eager"
    )
    theirs, ours = auto(tmp_path / "theirs").eval(), huggingface.load(tmp_path / "theirs")
    tokens, attend = prompts()
    want, real = said(theirs, tokens, attend), np.asarray(attend) > 0
    np.testing.assert_allclose(forward(ours, tokens, attend)[real], want[real], atol=1e-4)

    huggingface.save(tmp_path / "ours", ours, like=tmp_path / "theirs")
    huggingface.save(tmp_path / "new", ours)
    for folder in ("ours", "new"):
        assert huggingface.load(tmp_path / folder).config == ours.config
        again = said(auto(tmp_path / folder).eval(), tokens, attend)
        np.testing.assert_allclose(again[real], want[real], atol=1e-4)


# --- texts beyond the trained length --------------------------------------------------------------

LONG = {
    "dynamic": ("Llama, dynamic rope", {"max_position_embeddings": 12}),
    "longrope": ("Phi3, longrope", {"original_max_position_embeddings": 12}),
}


@pytest.mark.parametrize("kind", LONG)
def test_a_text_beyond_the_trained_length_turns_by_its_own_length(kind, tmp_path, transformers):
    case, change = LONG[kind]
    random_model(transformers, case, "CausalLM", **change).save_pretrained(tmp_path)
    rng = np.random.default_rng(1)
    rows = [rng.integers(1, 40, n) for n in (20, 14, 12, 5)]
    tokens, attend = left_padded(rows, 24)
    ours = huggingface.load(tmp_path)
    got = forward(ours, tokens, attend)
    for i, row in enumerate(rows):
        # Read again for each row: theirs keeps the frequencies of the longest text it has seen.
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        want = said(theirs, row[None], np.ones((1, len(row))))[0]
        np.testing.assert_allclose(got[i, 24 - len(row) :], want, atol=1e-4)
    short = dataclasses.replace(ours.config.rope_scaling, original_length=32)
    unscaled = transformer.Model(dataclasses.replace(ours.config, rope_scaling=short), ours.weights)
    assert np.abs(forward(unscaled, tokens, attend) - got)[0, 4:].max() > 1e-2
    # Packed, the texts keep their lengths.
    packed = np.concatenate([rows[1], rows[3]])[None], np.array([[1] * 14 + [2] * 5])
    np.testing.assert_allclose(forward(ours, *packed)[0, :14], got[1, 10:], atol=1e-4)
    np.testing.assert_allclose(forward(ours, *packed)[0, 14:], got[3, 19:], atol=1e-4)


@pytest.mark.parametrize("kind", ("dynamic", "longrope"))
def test_generation_past_the_trained_length_is_refused_where_it_would_turn_the_cache(kind):
    scaling = transformer.rope.Scaling(
        kind=kind, factor=2.0, original_length=16, short_factors=(1.0,), long_factors=(2.0,)
    )
    shape = transformer.Config(max_length=64, rope_scaling=scaling)
    transformer.check_length(shape, 16)
    with refused("need 17 positions", f"{kind} rope", "original_length=16"):
        transformer.check_length(shape, 17)


def test_rows_longer_than_a_table_of_positions_are_refused():
    shape = transformer.Config(max_length=8, positions="learned", norm="layer", num_layers=1)
    model = jax.eval_shape(lambda: transformer.init(shape, jax.random.key(0)))
    tokens = jnp.ones((1, 9), jnp.int32)
    with refused("need 9 positions", "max_length=8"):
        jax.eval_shape(transformer.hidden_states, model, tokens, tokens)


# --- scorers --------------------------------------------------------------------------------------

SCORERS = [case for case in CASES if "," not in case] + [
    "Llama, biases", "Mistral, window", "Ministral, layers of both kinds", "Phi3, window"
]  # fmt: skip


@pytest.mark.parametrize("case", SCORERS)
def test_a_scorer_trained_elsewhere_scores_here_and_goes_back(case, tmp_path, transformers):
    import torch

    kind = "SequenceClassification"
    theirs = random_model(transformers, case, kind, num_labels=1, pad_token_id=0)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = huggingface.load(tmp_path / "theirs")
    assert "head" not in ours.weights
    tokens, attend = prompts()
    ids, mask = torch.tensor(np.asarray(tokens)).long(), torch.tensor(np.asarray(attend)).long()
    places = {} if "OPT" in case else {"position_ids": mask.cumsum(1) - mask}
    with torch.no_grad():
        want = theirs(input_ids=ids, attention_mask=mask, **places).logits[:, 0].numpy()
    assert np.abs(want).max() > 0.3
    np.testing.assert_allclose(heads.sequence_scores(ours, tokens, attend), want, atol=1e-4)

    huggingface.save(tmp_path / "ours", ours, head="score", like=tmp_path / "theirs")
    back = type(theirs).from_pretrained(tmp_path / "ours")
    same_state(back, theirs)
    assert configuration(back) == configuration(theirs)

    new_ids = {"pad_token_id": 0, "eos_token_id": 39}
    huggingface.save(tmp_path / "new", ours, head="score", fields=new_ids)
    auto = transformers.AutoModelForSequenceClassification
    new = auto.from_pretrained(tmp_path / "new", attn_implementation="eager").eval()
    with torch.no_grad():
        again = new(input_ids=ids, attention_mask=mask, **places).logits[:, 0].numpy()
    np.testing.assert_allclose(again, want, atol=1e-4)


# --- export ---------------------------------------------------------------------------------------

SHAPE = transformer.Config(
    vocab_size=24, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=16,
    max_length=16,
)  # fmt: skip


def made_here(shape=SHAPE):
    return init(shape, jax.random.key(0))


def test_a_large_model_is_written_in_files_of_the_size_asked_for_with_an_index(tmp_path):
    model = made_here()
    huggingface.save(tmp_path / "whole", model)
    assert not list((tmp_path / "whole").glob("*.index.json"))
    huggingface.save(tmp_path / "parts", model, max_shard_bytes=4000)
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 4000 + 2000 for file in files)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(model.weights))
    for name in ("whole", "parts"):
        back = huggingface.load(tmp_path / name)
        assert back.config == model.config
        jax.tree.map(np.testing.assert_array_equal, back.weights, model.weights)


def test_the_dtype_written_is_the_one_asked_for_else_that_of_the_model_it_came_from(tmp_path):
    model = made_here()
    huggingface.save(tmp_path / "half", model, dtype="bfloat16")
    fields = json.loads((tmp_path / "half" / "config.json").read_text())
    assert fields["torch_dtype"] == "bfloat16"
    half = huggingface.load(tmp_path / "half")
    rounded = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16), np.float32), model.weights)
    jax.tree.map(np.testing.assert_array_equal, half.weights, rounded)
    size = (tmp_path / "half" / "model.safetensors").stat().st_size
    huggingface.save(tmp_path / "same", half, like=tmp_path / "half")
    assert (tmp_path / "same" / "model.safetensors").stat().st_size == size
    with refused("dtype='int8' cannot be written", "float32, bfloat16, float16"):
        huggingface.save(tmp_path / "none", model, dtype="int8")


@pytest.mark.parametrize("case", ("GPT2", "Phi3, window", "GPTNeoX", "OPT"))
def test_fused_tensors_go_through_a_mesh_in_shards(case, tmp_path, transformers):
    random_model(transformers, case, "CausalLM").save_pretrained(tmp_path / "theirs")
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
    whole = huggingface.load(tmp_path / "theirs")
    ours = huggingface.load(tmp_path / "theirs", mesh)
    jax.tree.map(np.testing.assert_array_equal, ours.weights, whole.weights)
    tokens, attend = prompts()
    with jax.set_mesh(mesh):
        got = forward(ours, *sharding.put_rows(mesh, (tokens, attend)))
    np.testing.assert_allclose(got, forward(whole, tokens, attend), atol=1e-4)
    kernel = ours.weights["layer_0"]["attention"]["query"]["kernel"]
    assert {x.data.size for x in kernel.addressable_shards} == {kernel.size // 4}
    huggingface.save(tmp_path / "ours", ours, like=tmp_path / "theirs")
    again = huggingface.load(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, again.weights, whole.weights)


def test_a_scorer_made_here_needs_a_bias_of_zero_and_a_padding_that_ends_no_text(tmp_path):
    scorer = transformer.with_score_head(
        transformer.without_lm_head(made_here()), jax.random.key(1)
    )
    head = scorer.weights["score"] | {"bias": jnp.array([0.5])}
    shifted = transformer.Model(SHAPE, scorer.weights | {"score": head})
    with refused("bias is 0.5", "without_score_bias"):
        huggingface.save(tmp_path, shifted)
    with refused("pad_token_id=None", "set it in fields"):
        huggingface.save(tmp_path, scorer)
    with refused("pad_token_id=1, eos_token_id=[1, 2]"):
        huggingface.save(tmp_path, scorer, fields={"pad_token_id": 1, "eos_token_id": [1, 2]})
    ids = {"pad_token_id": 0, "eos_token_id": 1}
    huggingface.save(tmp_path, transformer.without_score_bias(shifted), fields=ids)
    back = huggingface.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, back.weights, scorer.weights)
    with refused(tmp_path, "holds a model already"):
        huggingface.save(tmp_path, scorer, fields=ids)


def test_which_head_is_written_is_said_where_a_model_has_both(tmp_path):
    ids = {"pad_token_id": 0}
    both = transformer.with_score_head(made_here(), None)
    with refused("a language head and a scalar one", "head='lm' or 'score'"):
        huggingface.save(tmp_path, both)
    huggingface.save(tmp_path / "lm", both, head="lm", like=None)
    assert set(huggingface.load(tmp_path / "lm").weights) == set(made_here().weights)
    huggingface.save(tmp_path / "score", both, head="score", like=tmp_path / "lm", fields=ids)
    assert "head" not in huggingface.load(tmp_path / "score").weights
    huggingface.save(tmp_path / "back", both, head="lm", like=tmp_path / "score")
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLM"] and "id2label" not in fields
    with refused("head='score'", "has none"):
        huggingface.save(tmp_path / "none", made_here(), head="score")


def test_a_model_that_no_family_has_or_another_than_it_came_from_is_refused(tmp_path):
    stretched = transformer.rope.Scaling(kind="linear", factor=2.0)
    for options in ({"norm": "layer", "positions": "learned"}, {"rope_scaling": stretched}):
        strange = dataclasses.replace(SHAPE, post_norms=True, **options)
        with refused("no family of transformers", "post_norms=True"):
            configurations.fields_from(strange)
    huggingface.save(tmp_path / "one", made_here())
    wider = made_here(dataclasses.replace(SHAPE, d_ff=20))
    with refused("another model", "d_ff=20"):
        huggingface.save(tmp_path / "two", wider, like=tmp_path / "one")


def test_the_generation_settings_of_the_model_it_came_from_go_along(tmp_path):
    huggingface.save(tmp_path / "one", made_here())
    (tmp_path / "one" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    huggingface.save(tmp_path / "two", made_here(), like=tmp_path / "one")
    generation = json.loads((tmp_path / "two" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [1, 2]}


# --- without torch --------------------------------------------------------------------------------


def test_a_final_soft_cap_reaches_the_log_probabilities_of_tokens():
    model = made_here(dataclasses.replace(SHAPE, logit_softcap=0.7))
    model = jax.tree.map(lambda x: 10 * x, model)  # so that the cap matters
    tokens = jnp.arange(8)[None] % 24
    hidden = transformer.hidden_states(model, tokens, jnp.ones_like(tokens))
    raw = hidden @ model.weights["head"]["kernel"]
    want = losses.token_logprobs(0.7 * jnp.tanh(raw / 0.7), tokens, 0.5)
    got, _ = heads.token_logprobs(model, hidden, tokens, 0.5)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(want - losses.token_logprobs(raw, tokens, 0.5))[0, 1:].max() > 0.1
    np.testing.assert_allclose(transformer.logits(model, hidden), 0.7 * jnp.tanh(raw / 0.7))


def test_a_window_ends_with_its_document():
    model = made_here(dataclasses.replace(SHAPE, window=3, full_layers=(1,)))
    rows = [np.arange(1, 8), np.arange(9, 13)]
    packed = np.concatenate(rows)[None], np.array([[1] * 7 + [2] * 4])
    alone = [forward(model, row[None], np.ones((1, len(row)), int))[0] for row in rows]
    np.testing.assert_allclose(forward(model, *packed)[0], np.concatenate(alone), atol=1e-5)
    unbounded = transformer.Model(SHAPE, model.weights)
    assert np.abs(forward(unbounded, *packed) - forward(model, *packed)).max() > 1e-2


def test_every_family_names_every_tensor_of_its_models_once():
    for family in families.FAMILIES:
        options = {"positions": "rotary"} | family.fixed
        model = jax.eval_shape(
            lambda options=options: transformer.with_score_head(
                transformer.init(dataclasses.replace(SHAPE, **options), jax.random.key(0)), None
            )
        )
        paths = [sharding.path_name(path) for path, _ in jax.tree.leaves_with_path(model.weights)]
        groups = families.groups(family, paths)
        assert sorted(sum(groups.values(), ["score/bias"])) == sorted(paths)
        modules = {families._module(path) for path in paths} | {"layer"}
        assert modules == set(family.modules), family.model_type
