"""Base models, LoRA adapters, and `fuse`: the one-line call that swaps in the loss."""

from ual.models.entailment import Entailment as Entailment
from ual.models.fuse import FusedOutput, check_head, check_logits, fuse, unfuse
from ual.models.generate import Generated as Generated
from ual.models.generate import Prompt as Prompt
from ual.models.generate import generate as generate
from ual.models.load import attach_lora as attach_lora
from ual.models.load import load_config as load_config
from ual.models.load import load_model as load_model
from ual.models.load import load_tokenizer as load_tokenizer
from ual.models.merge import merge as merge
from ual.models.packing_check import check_isolation, is_padding_free
from ual.models.score import TokenScores as TokenScores
from ual.models.score import score as score

__all__ = [
    "Entailment",
    "FusedOutput",
    "Generated",
    "Prompt",
    "TokenScores",
    "attach_lora",
    "check_head",
    "check_isolation",
    "check_logits",
    "fuse",
    "generate",
    "is_padding_free",
    "load_config",
    "load_model",
    "load_tokenizer",
    "merge",
    "score",
    "unfuse",
]
