"""Every method of PEFT on the body and on the lm_head: the fused loss equals the wrapped model's own."""

import dataclasses
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from tests.architectures import cases
from tests.architectures.compare import described, difference
from tests.architectures.compare import loss_and_gradients as computed
from tests.architectures.page import CRASHES, NOT_BUILT, REFUSED, WORKS, WRONG
from ual.errors import UserError
from ual.models import fuse

VOCAB = 64  # a prime number, as elsewhere, has no blocks
BODY, HEAD, SAVED = "body", "lm_head", "modules_to_save"
ORDERS = ("fused, then wrapped", "wrapped, then fused")
_PROMPT = {"num_virtual_tokens": 2}
_SMALL = {"r": 4}
# The options of each method beyond its defaults; a method without `target_modules` has no placement.
METHODS: dict[str, dict[str, Any]] = {
    "LORA": _SMALL,
    "LORA with a bias": _SMALL | {"lora_bias": True},
    "LORA with DoRA": _SMALL | {"use_dora": True},
    "LORA with PiSSA": _SMALL | {"init_lora_weights": "pissa"},
    "LORA with rsLoRA": _SMALL | {"use_rslora": True},
    "LORA with trainable tokens": _SMALL | {"trainable_token_indices": [5, 6]},
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10},
    "ADAMSS": {"r": 4, "num_subspaces": 2},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "CARTRIDGE": _PROMPT,
    "CPT": {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "DEFT": _SMALL,
    "DELORA": _SMALL,
    "FOURIERFT": {"n_frequency": 8},
    "FROD": {"progressbar": False},
    "GLORA": _SMALL,
    "GRALORA": _SMALL,
    "HIRA": _SMALL,
    "HRA": _SMALL,
    "IA3": {"feedforward_modules": []},
    "LILY": _SMALL,
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LOHA": _SMALL,
    "LOKR": _SMALL,
    "MISS": _SMALL,
    "MULTITASK_PROMPT_TUNING": _PROMPT | {"num_tasks": 2},
    "OFT": {"oft_block_size": 8},
    "OSF": {"effective_rank": 4},
    "PEANUT": _SMALL,
    "POLY": _SMALL | {"n_tasks": 2, "n_skills": 2},
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "PSOFT": _SMALL,
    "PVERA": _SMALL,
    "P_TUNING": _PROMPT | {"encoder_hidden_size": 8},
    "RANDLORA": _SMALL,
    "ROAD": {"group_size": 16},
    "SHADOW": _SMALL | {"shadow_num_hidden_layers": 1},
    "SHIRA": {"r": 2, "random_seed": 0},
    "SUPERTUNING": {"sparsity": 0.9},
    "TINYLORA": {},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6], "target_modules": ["embed_tokens"]},
    "UNILORA": {"theta_d_length": 16},
    "VBLORA": {"num_vectors": 8, "vector_length": 8},
    "VERA": _SMALL,
    "WAVEFT": {"n_frequency": 8},
    "XLORA": {"hidden_size": 32, "xlora_depth": 1},
}
# Methods that add no adapter to chosen modules: tokens before the input, or layers of their own.
UNPLACED = {
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING",
    "P_TUNING", "SHADOW", "XLORA",
}  # fmt: skip
_TASKS = {"task_ids": torch.zeros(2, dtype=torch.long)}
INPUTS = {
    "CPT": {"input_type_mask": torch.ones(2, 8, dtype=torch.long)},
    "MULTITASK_PROMPT_TUNING": _TASKS,
    "POLY": _TASKS,
}


class Case(NamedTuple):
    """A method, where its adapter is, and when `fuse` is called."""

    method: str
    place: str
    order: str

    def __str__(self) -> str:
        return ", ".join(self)


def all_cases(methods: Iterable[str] = tuple(METHODS)) -> Iterator[Case]:
    for method in methods:
        for place in places(method):
            for order in ORDERS:
                yield Case(method, place, order)


def places(method: str) -> list[str]:
    if method in UNPLACED:
        return [BODY]
    fields = {f.name for f in dataclasses.fields(config_class(method))}
    return [
        BODY,
        *([HEAD] if method != "LN_TUNING" else []),
        *([SAVED] if "modules_to_save" in fields else []),
    ]


def config_class(method: str) -> Any:
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.split()[0])]


def wrapped(model: Any, case: Case) -> PeftModel:
    """The model with a random adapter of this method."""
    options = {"task_type": "CAUSAL_LM", **METHODS[case.method]}
    if case.method not in UNPLACED:
        options = {"target_modules": ["q_proj", "v_proj", "down_proj"]} | options
    if case.place == HEAD:
        options["target_modules"] = ["q_proj", "lm_head"]
    elif case.place == SAVED:
        options["modules_to_save"] = ["lm_head"]
    with tempfile.TemporaryDirectory() as folder:
        if case.method == "XLORA":  # mixes trained adapters
            other = cases.build("llama", "LlamaForCausalLM", vocab_size=VOCAB)
            get_peft_model(other, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(folder)
            options["adapters"] = {"0": folder, "1": folder}
        model = get_peft_model(model, config_class(case.method)(**options)).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


def check(case: Case) -> tuple[str, str]:
    """The outcome and its reason."""
    try:
        model = wrapped(tiny(), case)
        inputs = cases.inputs_of("llama") | INPUTS.get(case.method, {})
        own = computed(model, lambda: model(**inputs).loss)
    except Exception as error:
        return NOT_BUILT, described(error)
    try:
        model = wrapped(fuse(tiny()), case) if case.order == ORDERS[0] else fuse(wrapped(tiny(), case))
        fused = computed(model, lambda: model(**inputs).loss)
    except UserError as error:
        return REFUSED, str(error).splitlines()[0]
    except Exception as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        in_peft = Path(raised_in).is_relative_to(Path(peft.__file__).parent)
        return (REFUSED, f"by PEFT, {described(error)}") if in_peft else (CRASHES, described(error))
    if wrong := difference(fused, own):
        return WRONG, wrong
    return WORKS, ""


def tiny() -> Any:
    model = cases.build("llama", "LlamaForCausalLM", vocab_size=VOCAB)
    model.config.use_cache = False
    return model
