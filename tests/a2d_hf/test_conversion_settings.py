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
