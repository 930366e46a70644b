"""The model `a2d` of lm-evaluation-harness: a converted checkpoint as the harness sees it.

Owns the translation between the harness' requests and this project's likelihoods and decoder. A narrow subclass of
`HFLM`, which keeps what it does well: devices, tokenizers, chat templates, data parallelism under `accelerate launch`.
Likelihoods are likelihood.py's, decoding is the model's own `diffusion_generate`.
"""

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from tqdm import tqdm

from . import likelihood as likelihoods
from .errors import BadInput
from .modeling.generation_config_a2d import DIFFUSION_FIELDS, SHARED_FIELDS
from .modeling.modeling_a2d import A2DForMaskedDiffusion


NELBO, TOKEN_BY_TOKEN, CAUSAL = "nelbo", "token_by_token", "causal"
LIKELIHOODS = (NELBO, TOKEN_BY_TOKEN, CAUSAL)
# What a call of the decoder may be told; the harness decides the rest itself.
NOT_FOR_A_TASK = {"max_length", "max_new_tokens", "return_dict_in_generate", "num_return_sequences", "stop_strings"}
DECODING_FIELDS = {*DIFFUSION_FIELDS, *SHARED_FIELDS} - NOT_FOR_A_TASK
ROWS_AT_ONCE = 4096  # forward rows that are planned together
# Ways of HFLM to load a model that make no sense for one that was converted.
FOREIGN = ("delta", "autogptq", "gptqmodel", "gguf_file")

Pair = tuple[tuple[str, str] | None, list[int], list[int]]


class A2DLM(HFLM):
    """
    A converted checkpoint as a model of lm-evaluation-harness, under the name `a2d`.

    Multiple-choice and perplexity tasks ask how likely a continuation is. `likelihood` says how to answer: `"nelbo"`
    (Monte-Carlo, a lower bound), `"token_by_token"` (exact, from left to right) or `"causal"` (the parent's own
    next-token mode, with numbers equal to those of `--model hf`). Masks are keyed by the text of the request, so that
    neither batch size nor the number of processes changes a result.

    Args:
        pretrained (`str` or `PreTrainedModel`): a converted checkpoint, an autoregressive one (converted in memory,
            untrained), or a loaded model.
        likelihood (`str`, *optional*, defaults to `"nelbo"`): see above.
        mc_num (`int`, *optional*, defaults to 128): masks per request, for `"nelbo"`.
        mc_seed (`int`, *optional*, defaults to 0): key of the masks.
        check_greedy (`bool`, *optional*, defaults to `True`): with `"nelbo"`, whether to decode each continuation with
            one token per forward too, which is how tasks such as LAMBADA tell an exact match. Off: never a match.
        load_in_4bit, load_in_8bit (`bool`, *optional*): quantised by bitsandbytes when loaded.
        peft (`str`, *optional*): an adapter trained on this checkpoint.
        kwargs: any field of [`A2DGenerationConfig`] (`steps`, `block_size`, `selector`, `threshold`, `temperature`,
            ...) as the default of `generate_until`, over which a task's own and `--gen_kwargs` win; the rest goes to
            `HFLM`.
    """

    AUTO_MODEL_CLASS = A2DForMaskedDiffusion

    def __init__(
        self,
        pretrained: str | transformers.PreTrainedModel,
        likelihood: str = NELBO,
        mc_num: int = likelihoods.MC_NUM,
        mc_seed: int = 0,
        check_greedy: bool = True,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        **kwargs: Any,
    ):
        if likelihood not in LIKELIHOODS:
            raise BadInput(f"`likelihood` must be one of {', '.join(LIKELIHOODS)}, not {likelihood!r}.")
        if not isinstance(mc_num, int) or mc_num < 1:
            raise BadInput(f"`mc_num` must be a positive integer, not {mc_num!r}.")
        foreign = [name for name in FOREIGN if kwargs.get(name)]
        if foreign:
            raise BadInput(f"`{foreign[0]}` is for other models: the model `a2d` loads converted checkpoints.")
        if load_in_4bit and load_in_8bit:
            raise BadInput("`load_in_4bit` and `load_in_8bit` cannot both be on: choose one.")
        self.likelihood, self.mc_num, self.mc_seed, self.check_greedy = likelihood, mc_num, mc_seed, check_greedy
        self.decoding = {name: kwargs.pop(name) for name in list(kwargs) if name in DECODING_FIELDS}
        self._bits = 4 if load_in_4bit else 8 if load_in_8bit else None
        self.num_forwards = self.num_new_tokens = self.num_answers = 0
        self._tokens_per_forward = 0.0  # of all answers together
        kwargs["backend"] = "causal"
        # HFLM asks for CUDA unless told otherwise; a machine without one gets its CPU.
        kwargs.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        if not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Under torchrun, accelerate would take each process for the only one: on CPUs it has to be told.
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")
        super().__init__(pretrained, **kwargs)
        accelerator = vars(self).get("accelerator")
        if accelerator is not None:  # HFLM shares requests between GPUs only; processes on CPUs can share them too
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        if not isinstance(self.a2d, A2DForMaskedDiffusion):
            raise BadInput(f"`pretrained` must be an A2DForMaskedDiffusion, not a {type(self.a2d).__name__}.")

    @property
    def a2d(self) -> A2DForMaskedDiffusion:
        """The diffusion model itself, its adapter active inside."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def _create_model(self, pretrained: str, *args: Any, peft: str | None = None, **kwargs: Any) -> None:
        if self._bits is not None:
            precision = torch.bfloat16 if torch.cuda.is_available() else torch.float32
            kwargs["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=self._bits == 4,
                load_in_8bit=self._bits == 8,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=precision,
            )
        super()._create_model(pretrained, *args, peft=None, **kwargs)
        if peft:
            # HFLM would cut the embedding down to the tokenizer's length first, and the mask token's row with it.
            self._model = PeftModel.from_pretrained(self._model, peft)

    # ------------------------------------------------------------------------------------------------------ likelihood

    def _model_call(self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: Any = None):
        with torch.no_grad():
            logits = self.a2d(input_ids=inps, attention_mask=attn_mask, attention_pattern="causal").logits
        return logits[..., : self.a2d.config.parent_vocab_size]  # the parent knows no mask token

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.likelihood == CAUSAL:  # the harness' own way, on the parent's own logits
            for _, _, continuation in requests:
                self._check_room(continuation, self.max_length - len(continuation) + 1)
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        wanted = [self._request(context, continuation) for _, context, continuation in requests]
        answers = [(0.0, False)] * len(wanted)
        for index, value, match in self._answers(wanted, self._rows(override_bs), disable_tqdm, self.check_greedy):
            answers[index] = (value, match)
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The harness' windows hold one token more than the context: its models never read their last one."""
        if self.likelihood == CAUSAL:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        windows = [self._windows(*request.args) for request in requests]
        places = [number for number, text in enumerate(windows) for _ in text]
        found: list[list[float]] = [[] for _ in requests]
        wanted = [one for text in windows for one in text]
        for index, value, _ in self._answers(wanted, self._rows(), disable_tqdm, check_greedy=False):
            number = places[index]
            found[number].append(value)
            if len(found[number]) == len(windows[number]):
                self.cache_hook.add_partial("loglikelihood_rolling", requests[number].args, math.fsum(found[number]))
        return [math.fsum(values) for values in found]

    def _windows(self, text: str) -> list[likelihoods.Request]:
        tokens = self.tok_encode(text)
        if not tokens:
            return []
        return likelihoods.rolling_requests(tokens, self.max_length, prefix_id=self.prefix_token_id)

    def _rows(self, override: int | None = None) -> int:
        """Rows of a forward pass at most."""
        rows = override or self.batch_size
        return self.max_batch_size if rows == "auto" else rows

    def _answers(
        self, wanted: Sequence[likelihoods.Request], batch_size: int, disable_tqdm: bool, check_greedy: bool
    ) -> Iterator[tuple[int, float, bool]]:
        """
        Number, log-likelihood and whether greedy decoding writes it, of each request as soon as it is known: the cache
        then holds what an interrupted run has done. The longest come first, so that memory runs out at once or never,
        and a few at a time: all rows of a large task together would not fit into memory.
        """
        token_by_token = self.likelihood == TOKEN_BY_TOKEN
        decode = check_greedy and not token_by_token
        rows = [len(one.scored) if token_by_token else min(self.mc_num, 2 ** len(one.scored) - 1) for one in wanted]
        # The bar counts tokens that are read: a long request weighs more than a short one, so its estimate holds.
        work = [
            len(one.input_ids) * (count + decode * len(one.scored)) for one, count in zip(wanted, rows, strict=True)
        ]
        order = sorted(range(len(wanted)), key=lambda i: (-len(wanted[i].scored), -len(wanted[i].input_ids)))
        size = max(1, ROWS_AT_ONCE // max(rows, default=1))
        with tqdm(
            desc=f"{len(wanted)} requests, likelihood ({self.likelihood})", total=sum(work), unit=" tokens",
            unit_scale=True, disable=disable_tqdm or self.rank != 0,
        ) as bar:  # fmt: skip
            for start in range(0, len(order), size):
                some = order[start : start + size]
                asked = [wanted[i] for i in some]
                if token_by_token:
                    found = likelihoods.token_by_token(self.a2d, asked, batch_size=batch_size)
                    matches = [bool(one.is_greedy) for one in found]
                else:
                    found = likelihoods.nelbo(
                        self.a2d, asked, mc_num=self.mc_num, seed=self.mc_seed, batch_size=batch_size
                    )
                    matches = self._decoded_exactly(asked, batch_size) if decode else [False] * len(asked)
                yield from ((i, one.log_likelihood, match) for i, one, match in zip(some, found, matches, strict=True))
                bar.update(sum(work[i] for i in some))

    def _request(self, context: list[int], continuation: list[int]) -> likelihoods.Request:
        """Context and continuation, the context cut from the left where both do not fit."""
        room = self.max_length - len(continuation)
        self._check_room(continuation, room)
        return likelihoods.Request.continuation(context[-room:], continuation)

    def _check_room(self, continuation: list[int], room: int) -> None:
        if room < 1:
            raise BadInput(
                f"A continuation of {len(continuation)} tokens does not fit the model's context of {self.max_length}: "
                "give the model argument `max_length` where the model can read more, or leave the example out "
                "(--samples of a2d-lm-eval)."
            )

    def _decoded_exactly(self, wanted: Sequence[likelihoods.Request], batch_size: int) -> list[bool]:
        """Whether decoding, one token per forward and the surest first, writes exactly the continuation."""
        by_length: dict[int, list[int]] = {}
        for index, request in enumerate(wanted):
            by_length.setdefault(len(request.scored), []).append(index)
        matches = [False] * len(wanted)
        for length, indices in by_length.items():
            for start in range(0, len(indices), batch_size):
                chunk = indices[start : start + batch_size]
                prompts = [list(wanted[i].input_ids[:-length]) for i in chunk]
                longest = max(map(len, prompts))
                ids = torch.zeros((len(chunk), longest), dtype=torch.long, device=self.device)
                mask = torch.zeros_like(ids)
                for row, prompt in enumerate(prompts):
                    ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=self.device)
                    mask[row, longest - len(prompt) :] = 1
                written = self.a2d.diffusion_generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=length,
                    steps=length,
                    temperature=0.0,
                    return_dict_in_generate=False,
                )[:, longest:].tolist()
                for i, tokens in zip(chunk, written, strict=True):
                    matches[i] = tuple(tokens) == wanted[i].input_ids[-length:]
        return matches

    # ------------------------------------------------------------------------------------------------------ generation

    @property
    def tokens_per_forward(self) -> float | None:
        """Mean over the answers that have been written, each by the decoder's own count; `None` before the first."""
        return self._tokens_per_forward / self.num_answers if self.num_answers else None

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The harness' own, which only asserts that there is room for an answer."""
        for request in requests:
            room = request.args[1].get("max_gen_toks", self.max_gen_toks)
            if room >= self.max_length:
                raise BadInput(
                    f"A task's answers of up to {room} tokens do not fit the model's context of {self.max_length}: "
                    "give a lower max_gen_toks (in its task file, or with --gen_kwargs of a2d-lm-eval)."
                )
        return super().generate_until(requests, disable_tqdm)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        choices = self.decoding | generation_kwargs
        # The harness' words for greedy decoding, and ours.
        if choices.pop("do_sample", None) is False or choices.get("temperature") is None:
            choices["temperature"] = choices.get("temperature") or 0.0
        mixed = self.mixed_precision_dtype
        with torch.autocast(device_type=self.device.type, dtype=mixed, enabled=mixed is not None):
            output = self.a2d.diffusion_generate(
                context,
                max_new_tokens=max_length - context.shape[1],
                stop_strings=stop or None,
                tokenizer=self.tokenizer if stop else None,
                return_dict_in_generate=True,
                **choices,
            )
        self.num_forwards += int(output.num_forwards)
        self.num_answers += len(context)
        self._tokens_per_forward += float(output.tokens_per_forward.double().sum())
        pad = self.tokenizer.pad_token_id
        self.num_new_tokens += int((output.sequences[:, context.shape[1] :] != pad).sum())
        return output.sequences

    def get_model_info(self) -> dict[str, Any]:
        info = super().get_model_info() if isinstance(self.pretrained, str) else {}
        config = self.a2d.config
        return info | {
            "a2d": {
                "objective": config.objective,
                "block_size": config.block_size,
                "token_shift": config.token_shift,
                "likelihood": self.likelihood,
                "mc_num": self.mc_num if self.likelihood == NELBO else None,
                "mc_seed": self.mc_seed if self.likelihood == NELBO else None,
                "decoding": self.decoding,
                "num_forwards": self.num_forwards,
                "num_new_tokens": self.num_new_tokens,
                "tokens_per_forward": self.tokens_per_forward,
            }
        }
