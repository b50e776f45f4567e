"""The distillation of docs/training.md: a student approaches its teacher."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.ual.runs import ROOT, gsm8k


def snippets() -> list[str]:
    """The Python of the section."""
    _, _, section = (ROOT / "docs" / "training.md").read_text().partition("\n## Distillation\n")
    return re.findall(r"^```python\n(.*?)^```", section.partition("\n## ")[0], re.MULTILINE | re.DOTALL)


@pytest.mark.kills("ual_kernels/targets.py", "probabilities=p / torch.where", "probabilities=p * torch.where")
@pytest.mark.kills(
    "docs/training.md",
    "batch = SparseTarget(target.indices[samples]",
    "batch = SparseTarget(target.indices[:8]",
)
def test_the_student_approaches_its_teacher(
    stories: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student is the teacher with noise, and the text is real."""
    monkeypatch.chdir(tmp_path)
    teacher = AutoModelForCausalLM.from_pretrained(stories)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    encoded = AutoTokenizer.from_pretrained(stories)([row["question"] for row in gsm8k(shared, 40)])
    ids = torch.tensor([ids[:48] for ids in encoded["input_ids"] if len(ids) >= 48][:24])
    names: dict[str, Any] = {"teacher": teacher, "student": student, "ids": ids}
    for snippet in snippets():
        exec(compile(snippet, "docs/training.md", "exec"), names)
    before, *_, after = names["divergences"]
    assert 0 < after < before / 4
    # in whole batches and float64, over the complete vocabulary
    with torch.no_grad():
        exact = teacher(ids).logits.double().log_softmax(-1)
        learned = student(ids).logits.double().log_softmax(-1)
    assert (exact.exp() * (exact - learned)).sum(-1).mean() < before / 4
