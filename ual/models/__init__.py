"""Base models, LoRA adapters, and `fuse`, which gives a model the fused loss."""

from ual.models.entailment import Entailment
from ual.models.fuse import FusedOutput, check_head, check_logits, fuse, unfuse
from ual.models.generate import Generated, Prompt, generate
from ual.models.load import attach_lora, load_config, load_model, load_tokenizer
from ual.models.merge import merge
from ual.models.packing_check import check_isolation, is_padding_free
from ual.models.score import TokenScores, score

__all__ = [
    "Entailment", "FusedOutput", "Generated", "Prompt", "TokenScores", "attach_lora", "check_head",
    "check_isolation", "check_logits", "fuse", "generate", "is_padding_free", "load_config", "load_model",
    "load_tokenizer", "merge", "score", "unfuse",
]  # fmt: skip
