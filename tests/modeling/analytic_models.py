"""Models whose posterior is known exactly, for tests of decoding.

Owns fakes with the call signature of `A2DForMaskedDiffusion` and the real decoder on top. No weights: what such a
model answers is a table or a sum over a joint distribution that the test wrote down.
"""

import itertools
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from a2d_hf.modeling.canvas_a2d import A2DGenerationOutput
from a2d_hf.modeling.generation_a2d import A2DGenerationMixin
from a2d_hf.modeling.generation_config_a2d import A2DGenerationConfig


@dataclass
class Call:
    """What one forward pass was asked."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    logits_mask: torch.Tensor
    attention_pattern: object


@dataclass
class AnalyticModel(A2DGenerationMixin):
    """
    The decoder over a function of the tokens.

    Args:
        vocab_size (`int`): rows of the vocabulary, the mask token (the last one) included.
        fields: attributes of the config.
    """

    vocab_size: int
    fields: dict = field(default_factory=dict)
    defaults: dict = field(default_factory=dict)

    def __post_init__(self):
        values = {
            "mask_token_id": self.vocab_size - 1,
            "vocab_size": self.vocab_size,
            "objective": "mdlm",
            "block_size": None,
            "token_shift": False,
            "clean_context": "block",
            "max_position_embeddings": None,
        }
        self.config = SimpleNamespace(**values | self.fields)
        self.generation_config = A2DGenerationConfig(**self.defaults)
        self.device = torch.device("cpu")
        self.calls: list[Call] = []

    @property
    def mask(self) -> int:
        return self.config.mask_token_id

    def scores(self, input_ids: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Logits `(B, L, V)`."""
        raise NotImplementedError

    def __call__(self, input_ids, attention_mask=None, attention_pattern=None, logits_mask=None):
        self.calls.append(Call(input_ids.clone(), attention_mask, logits_mask, attention_pattern))
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        return SimpleNamespace(logits=self.scores(input_ids, valid)[logits_mask])


@dataclass
class TableModel(AnalyticModel):
    """Answers the same whatever it sees: `table[i]` holds the probabilities at position i."""

    table: list[list[float]] | torch.Tensor = ()

    def scores(self, input_ids, valid):
        probabilities = torch.as_tensor(self.table, dtype=torch.float64)[: input_ids.shape[1]]
        return probabilities.log().expand(input_ids.shape[0], -1, -1)


@dataclass
class JointModel(AnalyticModel):
    """
    The exact posterior of a joint distribution over `length` tokens of `vocab_size - 1` values.

    Args:
        joint (`torch.Tensor`): `length` dimensions of size `vocab_size - 1`, summing to 1.
    """

    joint: torch.Tensor = None

    def scores(self, input_ids, valid):
        length, values = self.joint.ndim, self.vocab_size - 1
        states = torch.tensor(list(itertools.product(range(values), repeat=length)))  # (S, L)
        weights = self.joint.flatten().double()
        fits = ((input_ids[:, None] == states[None]) | (input_ids[:, None] == self.mask)).all(-1)  # (B, S)
        weight = fits * weights
        one_hot = torch.nn.functional.one_hot(states, self.vocab_size).double()  # (S, L, V)
        marginal = torch.einsum("bs,slv->blv", weight, one_hot)
        return (marginal / weight.sum(-1)[:, None, None]).log()


@dataclass
class ContextModel(AnalyticModel):
    """Depends on every visible token and its position, by a fixed random hash: any leak of padding shows."""

    seed: int = 0
    sharpness: float = 3.0

    def scores(self, input_ids, valid):
        generator = torch.Generator().manual_seed(self.seed)
        width = 64
        token = torch.randn(self.vocab_size, width, generator=generator, dtype=torch.float64)
        place = torch.randn(512, width, generator=generator, dtype=torch.float64)
        head = torch.randn(width, self.vocab_size, generator=generator, dtype=torch.float64)
        position = (valid.long().cumsum(-1) - 1).clamp(min=0)
        each = torch.tanh(token[input_ids] + place[position]) * valid[..., None]
        whole = each.sum(1, keepdim=True) / valid.sum(-1)[:, None, None]
        return self.sharpness * torch.sin(3 * whole + place[position]) @ head


def changes(history: list[torch.Tensor], mask: int) -> list[list[int]]:
    """How many masks each forward filled, per row: `changes[f][r]`."""
    open_masks = [(step == mask).sum(-1) for step in history]
    return [(before - after).tolist() for before, after in itertools.pairwise(open_masks)]


# Vocabulary 0..3 and the mask token 4. Prompts of one token: position 0 is not scored.
TABLE = [
    [0.25, 0.25, 0.25, 0.25, 0.0],
    [0.10, 0.60, 0.20, 0.10, 0.0],  # position 1: token 1, .60
    [0.90, 0.05, 0.03, 0.02, 0.0],  # position 2: token 0, .90
    [0.30, 0.20, 0.05, 0.45, 0.0],  # position 3: token 3, .45
    [0.05, 0.05, 0.80, 0.10, 0.0],  # position 4: token 2, .80
    [0.33, 0.34, 0.20, 0.13, 0.0],  # position 5: token 1, .34
    [0.01, 0.01, 0.01, 0.97, 0.0],  # position 6: token 3, .97
]
BEST = [1, 0, 3, 2, 1, 3]
PROMPT = torch.tensor([[2]])


def table_model(**fields) -> TableModel:
    return TableModel(5, fields=fields, table=TABLE)


def run(model, ids=PROMPT, **kwargs) -> A2DGenerationOutput:
    return model.diffusion_generate(ids, return_dict_in_generate=True, **kwargs)


def committed_by_step(output: A2DGenerationOutput, mask: int = 4) -> list[list[int]]:
    """For the first row: which columns each forward filled."""
    return [
        ((before[0] == mask) & (after[0] != mask)).nonzero()[:, 0].tolist()
        for before, after in itertools.pairwise(output.history)
    ]
