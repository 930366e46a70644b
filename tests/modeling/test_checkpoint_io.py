"""Reading and writing converted checkpoints: bit-exact, under the parent's names, loadable by strangers."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    LlamaForCausalLM,
)

from a2d_hf.modeling import A2DConfig, A2DForMaskedDiffusion
from tests.conftest import FAMILIES, tiny_model, tiny_tokenizer


X = torch.randint(3, 110, (2, 12), generator=torch.Generator().manual_seed(0))


def convert(family="llama", dtype=torch.float32, **overrides) -> A2DForMaskedDiffusion:
    parent = tiny_model(family, **overrides).to(dtype)
    return A2DForMaskedDiffusion.from_causal_lm(parent, tiny_tokenizer()).eval()


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_exact(family, dtype, tmp_path):
    model = convert(family, dtype)
    model.save_pretrained(tmp_path)
    again = A2DForMaskedDiffusion.from_pretrained(tmp_path)
    assert same_weights(model, again) and again.dtype == dtype
    assert again.config.mask_token_id == model.config.mask_token_id
    if dtype == torch.float32:
        with torch.no_grad():
            assert torch.equal(model(X).logits, again.eval()(X).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_round_trip(tied, tmp_path):
    model = convert(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    again = A2DForMaskedDiffusion.from_pretrained(tmp_path)
    assert same_weights(model, again)
    is_tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert is_tied == tied == again.config.tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parents_own_class_reads_the_weights_exactly(family, tmp_path):
    model = convert(family)
    model.save_pretrained(tmp_path)
    parent = type(model.backbone).from_pretrained(tmp_path)
    assert same_weights(parent, model.backbone)
    with torch.no_grad():
        assert torch.equal(parent.eval()(X).logits, model(X, attention_pattern="causal").logits)


def test_weights_are_stored_under_the_parents_names(tmp_path):
    convert().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "backbone" in name]
        assert "model.layers.0.self_attn.q_proj.weight" in file.keys()


def test_an_ar_checkpoint_is_converted_in_memory(make_checkpoint):
    folder = make_checkpoint("qwen3")
    model = A2DForMaskedDiffusion.from_pretrained(folder, objective="bd3lm", block_size=4, token_shift=True)
    assert (model.config.objective, model.config.block_size, model.config.token_shift) == ("bd3lm", 4, True)
    assert model.mask_token.strategy == "free_row" and model.config.mask_token_id == model.mask_token.id
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(X).logits
        found = model.eval()(X, attention_pattern="causal").logits
    # The mask row is the one row of the tied head that a conversion writes.
    kept = [i for i in range(expected.shape[-1]) if i != model.config.mask_token_id]
    assert torch.equal(found[..., kept], expected[..., kept])


def test_fields_can_be_overridden_when_a_converted_checkpoint_is_loaded(tmp_path):
    convert().save_pretrained(tmp_path)
    model = A2DForMaskedDiffusion.from_pretrained(tmp_path, block_size=8, sliding_window="open")
    assert model.config.block_size == 8 and model.config.sliding_window == "open"


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM])
def test_auto_classes_load_a_converted_folder(auto, tmp_path):
    import a2d_hf  # noqa: F401

    model = convert()
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is A2DForMaskedDiffusion and same_weights(again, model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is A2DConfig


STRANGER = """
    import sys
    for name in ("a2d_hf", "a2d_hf.modeling", "a2d_hf.trainers"):
        sys.modules[name] = None  # a process without the package
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
    folder, trust = sys.argv[1], sys.argv[2] == "trust"
    for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
        model = auto.from_pretrained(folder, **({"trust_remote_code": True} if trust else {})).eval()
    x = torch.arange(3, 15)[None]
    with torch.no_grad():
        logits = model(x).logits
    torch.save(logits, sys.argv[3])
    masked = x.clone()
    masked[:, 4:9] = model.config.mask_token_id
    filled = model.diffusion_generate(masked, max_new_tokens=0, steps=5)
    assert (filled != model.config.mask_token_id).all()
    model.save_pretrained(sys.argv[4])  # a stranger can save it again
    assert "a2d_hf" not in type(model).__module__
"""


def run_stranger(tmp_path, folder, trust: str) -> subprocess.CompletedProcess:
    script = tmp_path / "stranger.py"
    script.write_text(textwrap.dedent(STRANGER))
    return subprocess.run(
        [sys.executable, str(script), str(folder), trust, str(tmp_path / "logits.pt"), str(tmp_path / "again")],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def test_a_process_without_the_package_loads_it_with_trust_remote_code(tmp_path):
    model, folder = convert(), tmp_path / "model"
    model.save_pretrained(folder)
    done = run_stranger(tmp_path, folder, "trust")
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        expected = model(torch.arange(3, 15)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)
    assert same_weights(A2DForMaskedDiffusion.from_pretrained(tmp_path / "again"), model)


def test_without_package_and_without_trust_it_is_a_clear_error(tmp_path):
    """A checkpoint that kept the parent's model_type would silently load the causal model here."""
    folder = tmp_path / "model"
    convert().save_pretrained(folder)
    done = run_stranger(tmp_path, folder, "no")
    assert done.returncode != 0 and "trust_remote_code=True" in done.stderr


def test_saving_an_own_state_dict(tmp_path):
    """Trainer passes the state dict of the wrapper; the prefix must not reach the file."""
    model = convert()
    doubled = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=doubled)
    again = A2DForMaskedDiffusion.from_pretrained(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(again.backbone.state_dict()[name], model.backbone.state_dict()[name] * 2)


def test_config_json_carries_what_makes_it_a_diffusion_model(tmp_path):
    convert().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "a2d" and config["text_config"]["model_type"] == "llama"
    wanted = {"mask_token_id", "objective", "block_size", "token_shift", "clean_context", "sliding_window"}
    assert wanted | {"vocab_size", "tie_word_embeddings", "auto_map"} <= config.keys()
    assert config["architectures"] == ["A2DForMaskedDiffusion"]


def test_push_to_hub_uploads_the_folder_that_save_writes(tmp_path, monkeypatch):
    import huggingface_hub

    uploaded = {}

    def create_repo(self, repo_id, **kwargs):
        return type("Url", (), {"repo_id": repo_id})()

    def create_commit(self, repo_id, operations, **kwargs):
        uploaded[repo_id] = {operation.path_in_repo for operation in operations}
        return type("Info", (), {"commit_url": "", "oid": "0"})()

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    convert().push_to_hub("someone/tiny-a2d")
    assert {"config.json", "model.safetensors", "modeling_a2d.py", "generation_config.json"} <= uploaded[
        "someone/tiny-a2d"
    ]


def test_push_to_hub_takes_the_conversions_own_card_along(tmp_path, monkeypatch):
    """transformers writes a card that says nothing; `a2d convert` wrote one with parent, gates and licence."""
    import huggingface_hub

    folder, uploaded = tmp_path / "model", {}
    convert().save_pretrained(folder)
    (folder / "README.md").write_text("# made from someone's model")
    (folder / "a2d_manifest.json").write_text("{}")

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            source = operation.path_or_fileobj
            is_text = str(source).endswith((".md", ".json"))
            uploaded[operation.path_in_repo] = Path(source).read_text() if is_text else None
        return type("Info", (), {"commit_url": "", "oid": "0"})()

    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **kwargs: type("Url", (), {"repo_id": repo_id})()
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    A2DForMaskedDiffusion.from_pretrained(folder).push_to_hub("someone/tiny-a2d")
    assert uploaded["README.md"] == "# made from someone's model"
    assert "a2d_manifest.json" in uploaded and "model.safetensors" in uploaded


def test_save_with_push_uploads_too(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(A2DForMaskedDiffusion, "push_to_hub", lambda self, repo_id, **kwargs: pushed.append(repo_id))
    convert().save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/tiny-a2d")
    assert pushed == ["someone/tiny-a2d"]


def test_an_encoder_decoder_or_encoder_is_refused_by_name(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration, ViTConfig

    T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="t5"):
        A2DForMaskedDiffusion.from_pretrained(tmp_path / "t5")
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="vit"):
        A2DForMaskedDiffusion.from_pretrained(tmp_path / "vit")


def test_lora_merges_back_exactly(tmp_path):
    """PEFT merges wrongly into a wrapper that hides its ties or vocabulary (measured: 21.7)."""
    from peft import LoraConfig, get_peft_model

    model = convert("qwen3")
    with torch.no_grad():
        before = model(X).logits
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    lora.trainable_token_indices = [model.config.mask_token_id]
    tuned = get_peft_model(model, lora).eval()
    with torch.no_grad():
        adapted = tuned(X).logits
        with tuned.disable_adapter():
            torch.testing.assert_close(tuned(X).logits, before, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(adapted, before, atol=1e-2)
    merged = tuned.merge_and_unload()
    assert type(merged) is A2DForMaskedDiffusion
    merged.save_pretrained(tmp_path)
    with torch.no_grad():
        again = A2DForMaskedDiffusion.from_pretrained(tmp_path).eval()(X).logits
    torch.testing.assert_close(again, adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["stories260K", "gpt-nano-sort"])
def test_real_checkpoints_convert_and_keep_their_parents_logits(real_data, name):
    folder = real_data / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = AutoConfig.from_pretrained(folder).vocab_size
    model = A2DForMaskedDiffusion.from_pretrained(folder, tokenizer=tokenizer).eval()
    parent = AutoModelForCausalLM.from_pretrained(folder).eval()
    x = torch.arange(9)[None] % rows
    with torch.no_grad():
        torch.testing.assert_close(
            model(x, attention_pattern="causal").logits[..., :rows], parent(x).logits, atol=1e-5, rtol=1e-5
        )
    assert tokenizer.mask_token_id == model.config.mask_token_id >= rows


def test_loading_a_causal_class_by_name_never_gives_random_weights(tmp_path):
    """A wrapper that saved `backbone.`-prefixed names made the parent's class start from random weights, silently."""
    model = convert()
    model.save_pretrained(tmp_path)
    _, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_the_config_class_reads_a_parents_folder_too(make_checkpoint):
    """PEFT asks for it when it saves an adapter of a model that was converted in memory."""
    config = A2DConfig.from_pretrained(make_checkpoint("qwen3"))
    assert config.model_type == "a2d" and config.text_config.model_type == "qwen3"
