"""The text tower of models of text and images or sound, against transformers on torch."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_families import forward
from test_huggingface import FIELDS, FOUR, refused, write

from rlhf_jax.data.tokenizers import byte_tokenizer, from_folder
from rlhf_jax.models import huggingface
from rlhf_jax.models.huggingface import configurations, files, towers

# save_pretrained reads config.json back without closing it (transformers 5.23).
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

TEXT = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, intermediate_size=32, max_position_embeddings=64,
            pad_token_id=0)  # fmt: skip
IMAGES = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
              image_size=16, patch_size=8)  # fmt: skip
CASES = {
    "Gemma3": {"sliding_window": 3},
    "Llava": {},
    "Mistral3": {"sliding_window": 4},
}


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def random_model(transformers, name, text, **options):
    import torch

    if not hasattr(transformers, f"{name}ForConditionalGeneration"):
        pytest.skip(f"these transformers have no {name}")
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}Config")
    parts = {"text_config": TEXT | text, "vision_config": IMAGES}
    for part, fields in parts.items():
        parts[part] = type(getattr(kind(), part))(**fields)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(kind(**parts, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


def said(model, tokens):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens)).logits.float().numpy()


TOKENS = np.array([[1, 5, 9, 3, 7, 2, 11, 30]])


@pytest.mark.parametrize("name", CASES)
def test_the_tower_says_of_a_text_what_the_whole_model_says(name, tmp_path, transformers):
    theirs = random_model(transformers, name, CASES[name])
    theirs.save_pretrained(tmp_path / "whole")
    expected = said(theirs, TOKENS)
    model = huggingface.load(tmp_path / "whole")
    ours = forward(model, jnp.asarray(TOKENS), jnp.ones_like(TOKENS))
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert np.abs(expected).max() > 0.1 and model.config == huggingface.shape(tmp_path / "whole")
    # Written, it is a language model of its own.
    huggingface.save(tmp_path / "tower", model, like=tmp_path / "whole")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tower").eval()
    assert not hasattr(back.config, "vision_config")
    np.testing.assert_allclose(said(back, TOKENS), expected, atol=1e-4)


def test_both_spellings_of_the_names_of_tensors_are_read(tmp_path, transformers):
    theirs = random_model(transformers, "Llava", {})
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, before = load_file(file), huggingface.load(tmp_path)
    old = any(name.startswith("language_model.model.") for name in tensors)

    def other(name):
        if old:
            return name.replace("language_model.model.", "model.language_model.").replace(
                "language_model.lm_head", "lm_head"
            )
        return name.replace("model.language_model.", "language_model.model.").replace(
            "lm_head", "language_model.lm_head"
        )

    save_file({other(name): x for name, x in tensors.items()}, file)
    after = huggingface.load(tmp_path)
    for path in ("embed", "norm", "head"):
        for name, x in before.weights[path].items():
            np.testing.assert_array_equal(x, after.weights[path][name])
    # A tensor of the tower that has no place in it is not passed over with the images.
    save_file({"language_model.model.more.weight": np.zeros(3, "f4")} | tensors, file)
    with refused("model.more.weight is not part of the model"):
        huggingface.load(tmp_path)


def test_what_text_config_leaves_out_has_the_default_of_transformers(transformers):
    for name, shape in towers.SHAPES.items():
        theirs = transformers.CONFIG_MAPPING[name]()
        for field, value in shape.items():
            heads = field == "num_key_value_heads" and value is None
            expected = theirs.num_attention_heads if heads else value
            assert getattr(theirs, field) == expected, (name, field)


def test_the_configuration_of_gemma_3_4b_is_read():
    """As the hub has it: most of the shape is left out."""
    fields = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
    }
    config = configurations.config_from(fields)
    assert (config.d_model, config.num_layers, config.d_ff) == (2560, 34, 10240)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.window, config.tied) == (262208, 1024, True)
    assert config.full_layers == (5, 11, 17, 23, 29)
    assert config.rope_scaling.factor == 8.0 and config.local_rope_base == 1e4


WRAPPED = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        (WRAPPED, ["text_config=None must be an object"]),
        (WRAPPED | {"text_config": "llama"}, ["text_config='llama' must be an object"]),
        (WRAPPED | {"text_config": {"model_type": "cohere2"}}, ["'cohere2' is not supported"]),
        (WRAPPED | {"text_config": {"model_type": 3}}, ["text_config.model_type=3"]),
        (
            {"architectures": ["PaliGemmaForConditionalGeneration"], "text_config": {}},
            ["PaliGemma", "is not supported", "LlavaForConditionalGeneration"],
        ),
        (
            WRAPPED | {"text_config": {}, "quantization_config": {"bits": 4}},
            ["quantization_config"],
        ),
    ],
)
def test_a_wrapper_whose_tower_is_not_built_is_refused_by_field(fields, parts):
    with refused("config.json", *parts):
        configurations.config_from(fields)


def test_an_adapter_of_a_wrapper_is_refused_with_the_remedy(tmp_path):
    """peft would look for it under the names of the whole model."""
    text = {k: v for k, v in (FIELDS | FOUR).items() if k != "architectures"}
    whole = write(tmp_path / "whole", WRAPPED | {"text_config": text})
    model = huggingface.load(write(tmp_path / "plain"))
    (tmp_path / "adapter").mkdir()
    for name in files.ADAPTER_FILES:
        (tmp_path / "adapter" / name).write_text("{}")
    for use in (huggingface.save_adapter, huggingface.load_adapter):
        with refused("LlavaForConditionalGeneration", "without an adapter"):
            use(tmp_path / "adapter", model, like=whole)


def test_the_eos_of_a_text_tower_ends_its_texts(tmp_path):
    byte_tokenizer().save(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 7}}))
    assert from_folder(tmp_path).eos_ids == (7,)
