"""Settings: bad values are named by their flag, defaults follow the model."""

import pytest

from a2d_hf.conversion_settings import ConversionSettings
from a2d_hf.errors import BadInput


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("objective", "dream", "--objective"),
        ("sliding_window", "half", "--sliding-window"),
        ("device", "tpu", "--device"),
        ("max_length", 1, "--max-length"),
        ("max_steps", 0, "--max-steps"),
        ("batch_size", 0, "--batch-size"),
        ("gradient_accumulation_steps", -1, "--gradient-accumulation-steps"),
        ("seed", -1, "--seed"),
        ("save_steps", 0, "--save-steps"),
        ("epochs", 0, "--epochs"),
        ("epochs", float("nan"), "--epochs"),
        ("learning_rate", 0, "--learning-rate"),
        ("learning_rate", 2, "--learning-rate"),
        ("held_out", 1, "--held-out"),
        ("held_out", -0.1, "--held-out"),
        ("mask_token_id", -1, "--mask-token-id"),
    ],
)
def test_a_bad_value_names_its_flag(field, value, flag):
    with pytest.raises(BadInput, match=f"^{flag} must"):
        ConversionSettings(source="x", **{field: value})


@pytest.mark.parametrize(("context", "expected"), [(None, 1024), (512, 512), (131072, 1024)])
def test_default_row_length(context, expected):
    assert ConversionSettings(source="x").row_length(context) == expected


@pytest.mark.parametrize(("width", "rate"), [(1024, 1e-4), (4096, 2.5e-5), (64, 1.6e-3), (16, 2e-3), (32768, 1e-5)])
def test_learning_rate_falls_with_the_width(width, rate):
    assert ConversionSettings(source="x").peak_learning_rate(width) == pytest.approx(rate)


def test_a_given_learning_rate_is_taken_as_it_is():
    assert ConversionSettings(source="x", learning_rate=3e-4).peak_learning_rate(64) == 3e-4


def test_settings_round_trip_through_the_manifest():
    settings = ConversionSettings(source="x", token_shift=True, max_steps=7)
    assert ConversionSettings(**settings.to_dict()) == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 4}, "--block-size belongs to --objective bd3lm, not mdlm"),
        ({"objective": "repalign", "clean_context": "causal"}, "--clean-context belongs to --objective bd3lm"),
        ({"objective": "bd3lm", "align_weight": 1.0}, "--align-weight belongs to --objective repalign, not bd3lm"),
        ({"objective": "bd3lm", "block_size": 0}, "--block-size must be 1 or more, not 0"),
        ({"objective": "bd3lm", "block_size": 5, "max_length": 32}, "--block-size 5 must divide --max-length 32"),
        ({"objective": "bd3lm", "max_length": 48}, "--block-size 32 must divide --max-length 48"),
        ({"objective": "bd3lm", "block_size_curriculum": [1, 4, 6]}, "must grow, .* 6 does not follow 4"),
        ({"objective": "bd3lm", "block_size_curriculum": [0, 4]}, "must be sizes of 1 or more"),
        ({"objective": "bd3lm", "block_size_curriculum": [1, 4], "block_size": 8}, "8 must be where .* ends: 4"),
        ({"objective": "bd3lm", "clean_context": "open"}, "--clean-context must be block or causal"),
        ({"objective": "repalign", "align_positions": "some"}, "--align-positions must be masked_shift or"),
        ({"objective": "repalign", "align_weight": -1.0}, "--align-weight must be 0 or more"),
        ({"lora_r": -1}, "--lora-r must be 0 or more"),
        ({"lora_alpha": 8}, "--lora-alpha needs --lora-r"),
        ({"lora_target_modules": ["q_proj"]}, "--lora-target-modules needs --lora-r"),
        ({"lora_r": 4, "data": None}, "--lora-r is about training: pass --data"),
    ],
)
def test_what_does_not_fit_together_is_said(settings, message):
    with pytest.raises(BadInput, match=message):
        ConversionSettings(**{"source": "x", "data": "d.txt"} | settings)


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({}, {"objective": "mdlm"}),
        ({"objective": "repalign"}, {"objective": "mdlm"}),
        ({"objective": "bd3lm"}, {"objective": "bd3lm", "block_size": 32, "clean_context": "block"}),
        (
            {"objective": "bd3lm", "block_size_curriculum": [1, 2, 8], "clean_context": "causal"},
            {"objective": "bd3lm", "block_size": 8, "clean_context": "causal"},
        ),
    ],
)
def test_what_the_objective_asks_of_the_model(settings, fields):
    chosen = ConversionSettings(source="x", data="d.txt", **settings)
    assert chosen.model_fields == fields
    assert ConversionSettings(**chosen.to_dict()) == chosen


def test_rows_hold_whole_blocks():
    chosen = ConversionSettings(source="x", objective="bd3lm", block_size=48)
    assert [chosen.row_length(context) for context in (None, 128, 48)] == [21 * 48, 96, 48]
    with pytest.raises(BadInput, match="--block-size 48 is longer than a row of at most 40 tokens"):
        chosen.row_length(40)


def test_an_adapter_learns_ten_times_as_fast_within_bounds():
    plain, adapter = ConversionSettings(source="x"), ConversionSettings(source="x", data="d.txt", lora_r=8)
    assert adapter.peak_learning_rate(1024) == pytest.approx(10 * plain.peak_learning_rate(1024))
    assert adapter.peak_learning_rate(64) == 2e-3
