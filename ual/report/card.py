"""The model card of an adapter: README.md as the Hugging Face hub reads it, from the files of the run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ual import __version__
from ual.config.run import RunConfig
from ual.report.findings import METRICS, duration
from ual.runs.read import number, section, text


def card(config: RunConfig, metrics: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """Return the card as Markdown with a YAML head.

    Args:
        config: of the run; paths of this machine are reduced to their last part.
        metrics: as in metrics.json; the card names only what was measured.
        environment: as in environment.json.
    """
    head: dict[str, Any] = {"library_name": "peft" if config.lora else "transformers"}
    if _is_hub_name(config.model.path):
        head["base_model"] = config.model.path
    smoothed = ["label-smoothing"] if metrics["mean_smoothing"] else []
    head["tags"] = ["ual", *smoothed, f"loss:{config.loss.kind}", *(["lora"] if config.lora else [])]
    head["pipeline_tag"] = "text-generation"
    lines = [
        f"# {config.label}",
        "",
        *_training(config, metrics),
        "",
        *_usage(config),
        *_figures(metrics),
        *_origin(environment),
    ]
    return "---\n" + yaml.safe_dump(head, sort_keys=False) + "---\n\n" + "\n".join(lines).rstrip() + "\n"


def _training(config: RunConfig, metrics: Mapping[str, Any]) -> Iterator[str]:
    what = "A LoRA adapter for" if config.lora else "All weights of"
    files = [config.data.train] if isinstance(config.data.train, str) else config.data.train
    data = ", ".join(f"`{_name(file)}`" for file in files)
    yield f"{what} `{_name(config.model.path)}`, fine-tuned on {data}:"
    yield ""
    mean, own = metrics["mean_smoothing"], metrics.get("own_smoothing") or 0
    smoothing = f"label smoothing {mean:.3f} on average" if mean else "without label smoothing"
    if mean and config.over_options:
        smoothing += ", spread over each sample's options at the token where they differ"
    yield f"- loss `{config.loss.kind}`, {smoothing}"
    if own:
        yield f"- {own:,} samples with a label smoothing of their own"
    ranked = config.loss.about.needs_uncertainty and config.smoothing.map != "constant"
    if ranked and own < metrics["trained_rows"]:
        yield (
            f"- each sample's smoothing from its uncertainty ({config.uncertainty.estimator}), "
            f"{config.smoothing.sentence}"
        )
    if config.lora:
        kinds = ["rsLoRA"] * config.lora.use_rslora + ["DoRA"] * config.lora.use_dora
        kind = f" ({', '.join(kinds)})" if kinds else ""
        yield (
            f"- LoRA{kind} of rank {config.lora.r}, alpha {config.lora.alpha:g}, dropout "
            f"{config.lora.dropout:g}, on {config.lora.target_modules}"
        )
    tokens, seconds = number(metrics, "trained_tokens"), number(metrics, "seconds")
    yield (
        f"- {metrics['trained_rows']:,} samples, {metrics['steps']:,} steps, "
        f"{tokens or 0:,.0f} loss tokens in {duration(seconds)}; status: {metrics['status']}"
    )


def _usage(config: RunConfig) -> Iterator[str]:
    """Yield a program that asks the model as it was trained, with its template and system prompt."""
    template = _name(config.data.chat_template) if config.data.chat_template else "of the base model"
    prompt = config.data.system_prompt
    yield f"Samples were rendered with the chat template {template}, which the tokenizer here has."
    if prompt:
        yield f"Conversations without a system turn have the system prompt {prompt!r}."
    of, auto = "transformers", "AutoModelForCausalLM"
    if config.lora:
        of, auto = "peft", "AutoPeftModelForCausalLM"
    system = [f'{{"role": "system", "content": {prompt!r}}}'] if prompt else []
    variables = "".join(f", {name}={value!r}" for name, value in config.data.chat_template_kwargs.items())
    messages = ", ".join([*system, '{"role": "user", "content": "..."}'])
    variables = "".join(f", {name}={value!r}" for name, value in config.data.chat_template_kwargs.items())
    yield from f"""
```python
from {of} import {auto}
from transformers import AutoTokenizer

name = "."  # this folder, or its name on the hub
model = {auto}.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
messages = [{messages}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{variables}
)
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

""".splitlines()


def _figures(metrics: Mapping[str, Any]) -> Iterator[str]:
    before, after = metrics.get("eval_before"), metrics.get("eval")
    if after is None:
        yield "It was not measured on held-out samples."
        yield ""
        return
    yield "On held-out samples, token level:"
    yield ""
    yield "| | before | after |"
    yield "|---|---|---|"
    for metric in METRICS:
        old = metric.show(number(before or {}, metric.key))
        yield f"| {metric.name} | {old} | {metric.show(number(after, metric.key))} |"
    yield ""


def _origin(environment: Mapping[str, Any]) -> Iterator[str]:
    versions = section(environment, "versions")
    named = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions
    )
    commit = text(environment, "git_commit")
    at = f" at {commit[:12]}" if commit else ""
    yield f"Made by ual {__version__}{at} ({named}), {text(environment, 'created')}."
    for path, digest in section(environment, "data_sha256").items():
        yield f"SHA-256 of {_name(path)}: `{digest}`."


def _name(path: str) -> str:
    return path if _is_hub_name(path) else Path(path).name


def _is_hub_name(path: str) -> bool:
    """Return whether a path reads as owner/name and does not exist on this machine."""
    return path.count("/") == 1 and path[0] not in "./~" and not Path(path).exists()
