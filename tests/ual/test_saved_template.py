"""What was trained with is saved: each saved tokenizer renders the prompts of the training."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.faults.test_bad_input import ROWS
from tests.ual.runs import configure
from ual.config.run import load
from ual.data import load as load_samples
from ual.data.render import IGNORE_INDEX
from ual.models.merge import merge
from ual.pipelines import samples
from ual.pipelines.train import run

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
OWN = """{{ bos_token }}{% for m in messages %}[{{ m.role }}]
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
{%- else %}{{ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}[assistant]{% if thinks %}<think>{% endif %}{% endif %}"""


@pytest.mark.kills("ual/pipelines/samples.py", "tokenizer.chat_template = made_by.template.text", "pass")
@pytest.mark.kills("ual/models/merge.py", 'update={"tokenizer": str(adapter)} if saved else {}', "update={}")
@pytest.mark.parametrize("template", ["chatml", "plain", "own.jinja"])
def test_saved_tokenizers_render_the_prompts_of_the_training(
    tmp_path: Path, tiny: Path, template: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "own.jinja").write_text(OWN)
    named = str(tmp_path / template) if template.endswith("jinja") else template
    data = {"chat_template": named, "system_prompt": "Be `brief`."}
    variables = {"thinks": False} if template == "own.jinja" else {}
    data |= {"chat_template_kwargs": variables}
    training = {"max_steps": 1, "save_steps": 1}
    config = load(configure(tmp_path, tiny, ROWS, uncertainty="column", training=training, data=data))
    folder = run(config).folder
    merge(config.model, folder / "adapter", tmp_path / "merged")
    _, made_by = samples.renderer(config)
    sample = load_samples(config.data.train)[0]
    tokens = made_by.render(sample)
    first = int((tokens.labels != IGNORE_INDEX).argmax())
    prompt = [{"role": "system", "content": "Be `brief`."}, *(m.as_dict() for m in sample.prompt)]
    for saved in (folder / "adapter", folder / "checkpoints" / "checkpoint-1", tmp_path / "merged"):
        tokenizer = AutoTokenizer.from_pretrained(saved)
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        assert ids == tokens.input_ids[:first].tolist(), saved
        assert "{% generation %}" in tokenizer.chat_template

    card = (folder / "adapter" / "README.md").read_text()
    assert f"chat template {template}" in card
    assert "'Be `brief`.'" in card
    assert str(tmp_path) not in card
    program = card.split("```python\n")[1].split("```")[0].replace("max_new_tokens=256", "max_new_tokens=2")
    assert '{"role": "system", "content": \'Be `brief`.\'}' in program
    assert (", thinks=False" in program) == bool(variables)
    monkeypatch.chdir(folder / "adapter")
    exec(program, {})
    assert capsys.readouterr().out
