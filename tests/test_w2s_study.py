"""The study of docs/weak-to-strong.md in small: SciQ as it is published, and a model of 260K parameters."""

from pathlib import Path

import yaml

from benchmarks.studies import weak_to_strong as study
from ual.config.base import load_as
from ual.config.weak_to_strong import WeakToStrongConfig
from ual.pipelines.weak_to_strong.run import run


def test_the_study_in_small(shared: Path, stories: Path, tmp_path: Path) -> None:
    raw = study.configuration(shared / "data", tmp_path, stories)
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(study.TASK))
    for who in ("weak", "strong"):
        raw[who] |= {"model": str(stories), "lora": {"r": 4}}
        raw[who]["training"] |= {"max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 0}
    raw |= {"split": {"limit": 24, "test_limit": 12}, "seeds": [1], "budget": "tokens"}
    (tmp_path / "sciq.yaml").write_text(yaml.safe_dump(raw))
    found = run(load_as(WeakToStrongConfig, tmp_path / "sciq.yaml")).summary
    assert found is not None
    assert found["status"] == "completed"
    assert found["questions"]["unsupervised"] == found["questions"]["test"] == 12
    collected = study.collect(tmp_path)
    text = str(collected)
    assert str(tmp_path) not in text
    assert str(stories) not in text
    assert "`soft_labels`" in study.arms_table(collected)
    assert study.levels_table(collected).count("\n") == len(found["levels"]) + 1
