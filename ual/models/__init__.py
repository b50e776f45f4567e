"""Base models, LoRA adapters, and `fuse`, which gives a model the fused loss.

Importing this package needs torch, transformers and peft only.
"""

from ual.models.fuse import FusedOutput, check_head, check_logits, fuse, unfuse

__all__ = ["FusedOutput", "check_head", "check_logits", "fuse", "unfuse"]
