"""Base models, LoRA adapters, and `fuse`: the one-line call that swaps in the loss."""

from ual.models.entailment import Entailment as Entailment
from ual.models.fused_loss import FusedOutput as FusedOutput
from ual.models.fused_loss import fuse as fuse
from ual.models.fused_loss import unfuse as unfuse
from ual.models.generate import Generated as Generated
from ual.models.generate import Prompt as Prompt
from ual.models.generate import generate as generate
from ual.models.load import attach_lora as attach_lora
from ual.models.load import load_model as load_model
from ual.models.load import load_tokenizer as load_tokenizer
from ual.models.score import TokenScores as TokenScores
from ual.models.score import score as score

__all__ = [
    "Entailment",
    "FusedOutput",
    "Generated",
    "Prompt",
    "TokenScores",
    "attach_lora",
    "fuse",
    "generate",
    "load_model",
    "load_tokenizer",
    "score",
    "unfuse",
]
