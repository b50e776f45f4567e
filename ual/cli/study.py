"""`ual evaluate`, `ual reliability`, `ual w2s`, `ual compare` and `ual quickstart`."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from ual.cli import tables
from ual.cli.console import (
    Debug,
    Json,
    TrustRemoteCode,
    app,
    err,
    errors,
    out,
    print_json,
    set_single_process,
    settle,
    tensorboard_in,
)
from ual.errors import UserError
from ual.files import cache_folder


@app.command(
    epilog="\b\n[bold]Examples[/bold]\n  ual reliability answers.jsonl -o rows.jsonl\n"
    "  ual reliability answers.jsonl -o rows.jsonl --method reweight\n"
    "  ual reliability answers.jsonl -o rows.jsonl --rule quantile --value 0.25"
)
def reliability(
    answers: Annotated[
        Path, typer.Argument(help="Several answers per question (JSONL, may be .gz).", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Training samples for `ual train`.")],
    method: Annotated[
        Literal["filter", "reweight", "majority"],
        typer.Option(
            help="filter: the majority answers of consistent questions. reweight: each distinct answer, with "
            "a weight. majority: the majority answers of all questions."
        ),
    ] = "filter",
    rule: Annotated[
        Literal["median", "quantile", "absolute"],
        typer.Option(help="Threshold of the filter: the highest entropy of a question that is selected."),
    ] = "median",
    value: Annotated[
        float | None,
        typer.Option(
            help="For --rule: the quantile, or the entropy in nats (0.5004 if 4 of 5 answers agree)."
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Temperature of the softmax over answer shares; 0.2 suits 5 answers.")
    ] = 0.2,
    unparsed: Annotated[
        Literal["class", "drop_question"],
        typer.Option(help="How to count an answer that could not be parsed."),
    ] = "class",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Filter or re-weight a weak supervisor's labels by how well its answers agree (arXiv 2406.19032)."""
    with errors(debug):
        from ual.pipelines import weak_labels as reading

        if output.exists() and answers.exists() and output.samefile(answers):
            raise UserError("--output is the file of answers", remedy="choose another output file")
        rows, summary = reading.process(
            answers, method=method, rule=rule, value=value, temperature=temperature, unparsed=unparsed
        )
        reading.write(rows, output)
        if as_json:
            print_json(asdict(summary) | {"output": output})
            return
        out.print(tables.levels(summary))
        out.print(f"{summary.samples} samples of {summary.questions} questions in {output}", highlight=False)


_W2S_EXAMPLE = """\b
[bold]A study[/bold]
  task: sciq                      # or a YAML file, see docs/weak-to-strong.md
  data: {train: train.jsonl, test: test.jsonl}
  weak:                           # a run as for `ual train`
    model: HuggingFaceTB/SmolLM2-135M-Instruct
    training: {max_steps: 200}
  strong:
    model: HuggingFaceTB/SmolLM2-1.7B-Instruct
    training: {max_steps: 400}    # of every arm
  ask: {by: order, times: 5}
  arms: \\[naive, filter, reweight, random, ceiling]
  seeds: \\[1, 2, 3]

\b
[bold]Examples[/bold]
  ual w2s study.yaml --dry-run        check everything, and what it takes
  ual w2s study.yaml                  run it; run it again to resume
  ual w2s study.yaml --stage answers  one stage of it
  ual w2s paper-gsm8k data.train=train.jsonl --dry-run

\b
[bold]Arms[/bold]  (docs/weak-to-strong.md)
  naive, majority, filter, random, reweight, filter_reweight, soft_labels,
  confidence, reverse, smoothing, self, ceiling

\b
[bold]Presets[/bold]  (settings of arXiv 2406.19032)
  paper-hellaswag, paper-mmlu, paper-ethics, paper-gsm8k
"""


@app.command(epilog=_W2S_EXAMPLE)
def w2s(
    config: Annotated[
        str, typer.Argument(help="The study's YAML file, or the name of a preset.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example ask.times=3.")
    ] = None,
    stage: Annotated[
        Literal["split", "weak", "answers", "arms", "strong", "evaluation", "report"] | None,
        typer.Option(help="Compute this stage only; those before it must be complete."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the study and show its size; train nothing.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a strong model on a weak supervisor's labels, filtered and re-weighted by their reliability."""
    with errors(debug):
        from ual.config.base import load_as
        from ual.config.weak_to_strong import PRESETS, WeakToStrongConfig

        resolved = load_as(WeakToStrongConfig, PRESETS.get(config, Path(config)), overrides or [])
        settle(Path(resolved.output_dir))
        if dry_run:
            from ual.pipelines.weak_to_strong.dry_run import plan

            found = plan(resolved, trust_remote_code=trust_remote_code)
            if as_json:
                print_json(found)
            else:
                out.print(tables.study_plan(found))
            return
        from ual.pipelines.weak_to_strong.run import run

        if "RANK" not in os.environ and {"deepspeed"} & (resolved.weak.keys() | resolved.strong.keys()):
            set_single_process()
        result = run(
            resolved,
            only=stage,
            command=["ual", *sys.argv[1:]],
            trust_remote_code=trust_remote_code,
            console=err,
            cache=cache_folder(os.environ),
            before_each=tensorboard_in,
        )
        if as_json:
            print_json(result.summary)
        elif result.summary is not None:
            out.print(tables.study(result.summary))
            assert result.report is not None
            out.print(f"report   {result.report.resolve()}", highlight=False, soft_wrap=True)


_EVALUATE_EXAMPLE = """\b
[bold]An evaluation[/bold]
  models:                         # runs or models; the first is the baseline
    base: HuggingFaceTB/SmolLM2-135M-Instruct
    ual: runs/ual
  tasks:
    sciq: {task: sciq, data: test.jsonl, limit: 1000}
    held_out: held_out.jsonl      # samples: the NLL of their responses
  lm_eval: {tasks: \\[gsm8k]}      # tasks of the lm-evaluation-harness
  fit: 0.2                        # share of the items that fit the temperature

\b
[bold]Examples[/bold]
  ual evaluate evaluation.yaml
  ual evaluate runs/ual --task sciq --data test.jsonl
  ual evaluate base=models/SmolLM2 ual=runs/ual --data held_out.jsonl -o evaluation
  ual evaluate runs/ual --lm-eval gsm8k,truthfulqa_mc2
  ual evaluate runs/ual --judge judge.yaml --reference outputs.json

\b
[bold]Tasks[/bold]  (docs/evaluation.md)
  arc, boolq, chaosnli, ethics, gsm8k, hellaswag, mmlu, sciq, or a YAML file
"""


@app.command(epilog=_EVALUATE_EXAMPLE)
def evaluate(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG [KEY=VALUE]... | [NAME=]MODEL...",
            help="A YAML file, or runs and models to compare.",
            show_default=False,
        ),
    ],
    task: Annotated[
        str | None, typer.Option(help="A shipped task, or a YAML file; without it, samples are measured.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="The file of questions or samples; may be repeated.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=2, help="Items: a random choice of --data, the first ones of --lm-eval and --judge."
        ),
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", help="Tasks of the lm-evaluation-harness, with commas.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="A folder of more task files, for --lm-eval.")
    ] = None,
    judge: Annotated[
        Path | None, typer.Option(help="A YAML file with a judge's backend; compares with --reference.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Answers in AlpacaEval's format, for --judge.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="chatml, plain or a Jinja file, for models that are no runs.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder; by default output_dir, or runs/evaluate-MODELS."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure models: proper scores, calibration, ranking, accuracy, and agreement with people."""
    with errors(debug):
        from ual.config.base import load_as, parse_as
        from ual.config.evaluate import Asked, EvaluateConfig, of_models

        asked = Asked(task, data or [], limit, lm_eval, include_path, judge, reference, chat_template)
        if Path(what[0]).suffix in (".yaml", ".yml"):
            if stray := asked.given:
                raise UserError(f"{stray[0]} is for models, and {what[0]} says what is measured")
            overrides = what[1:] + ([f"output_dir={output}"] if output else [])
            resolved = load_as(EvaluateConfig, what[0], overrides)
        else:
            raw = of_models(what, asked)
            raw["output_dir"] = str(output or f"runs/evaluate-{'-'.join(raw['models'])[:80]}")
            resolved = parse_as(EvaluateConfig, raw, place="arguments")
        settle(Path(resolved.output_dir))
        from ual.pipelines.evaluation.run import run

        common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "console": err}
        result = run(resolved, command=["ual", *sys.argv[1:]], keys=os.environ, **common)
        if as_json:
            print_json(result.summary)
            return
        out.print(tables.evaluation(result.summary))
        for file in ("evaluation.json", "evaluation.csv"):
            out.print(f"figures  {(result.folder / file).resolve()}", highlight=False, soft_wrap=True)


_COMPARE_EXAMPLE = """\b
[bold]An experiment[/bold]
  base:                           # a run as for `ual train`
    model: HuggingFaceTB/SmolLM2-135M-Instruct
    data: {train: rows.jsonl, eval_fraction: 0.1}
    uncertainty: white_box
    smoothing: {match_mean: 0.1}  # uniform and ual smooth equally on average
    training: {max_steps: 500}
  arms:                           # overrides; first: the baseline
    sft: {loss: sft}
    uniform: {loss: uniform}
    ual: {loss: ual}
  seeds: \\[1, 2, 3]

\b
[bold]Examples[/bold]
  ual compare experiment.yaml --dry-run   check every arm, train nothing
  ual compare experiment.yaml             train; run it again to resume
"""


@app.command(epilog=_COMPARE_EXAMPLE)
def compare(
    config: Annotated[Path, typer.Argument(help="The experiment's YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example base.lora.r=8.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every arm and show its size; train nothing.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train several arms with several seeds at equal budgets, and compare them on one page."""
    with errors(debug):
        from ual.config.base import load_as
        from ual.config.experiment import ExperimentConfig

        resolved = load_as(ExperimentConfig, config, overrides or [])
        settle(Path(resolved.output_dir))
        if "RANK" not in os.environ and any(cell.config.deepspeed for cell in resolved.cells()):
            set_single_process()
        common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "cache": cache_folder(os.environ)}
        if dry_run:
            from ual.pipelines.experiment import checked
            from ual.pipelines.preview import plan

            plans = {
                cell.arm: plan(cell.config, resume="auto", console=err, **common)
                for cell in checked(resolved)
                if cell.seed == resolved.seeds[0]
            }
            if as_json:
                print_json({"arms": plans, "seeds": resolved.seeds})
                return
            for arm, found in plans.items():
                out.print(f"[bold]{escape(arm)}[/bold]  seeds {', '.join(map(str, resolved.seeds))}")
                out.print(tables.plan(found))
            return
        from ual.pipelines.experiment import run

        result = run(
            resolved, command=["ual", *sys.argv[1:]], console=err, before_each=tensorboard_in, **common
        )
        if as_json:
            print_json(result)
            return
        out.print(tables.arms(result.metrics))
        out.print()
        out.print(tables.paired(result.paired))
        out.print(f"report   {result.report.resolve()}", highlight=False, soft_wrap=True)


@app.command(
    epilog="\b\n[bold]Examples[/bold]\n  ual quickstart\n  ual quickstart --steps 4 --rows 48 --output short"
)
def quickstart(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A new folder for data, runs and report.")
    ] = Path("quickstart-run"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each arm.")] = 36,
    rows: Annotated[int, typer.Option(min=6, help="Training samples; a third as many are held out.")] = 288,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a real 135M-parameter model three ways on a CPU: plain, uniform smoothing, UAL."""
    with errors(debug):
        settle(output)
        from ual.pipelines.quickstart.run import run

        command = ["ual", *sys.argv[1:]]
        result = run(
            output, steps=steps, samples=rows, cache=cache_folder(os.environ), command=command, console=err
        )
        if as_json:
            print_json(result)
            return
        out.print(tables.arms(result.metrics))
        out.print()
        out.print(tables.paired(result.paired))
        longer = f"name=longer output_dir=runs/longer training.max_steps={10 * steps}"
        out.print(
            f"\n{steps} steps with one seed show that the pipeline works, not which method is better.\n\n"
            f"open     {result.report.resolve()}\nnext     ual train {output / 'ual.yaml'} {longer}",
            highlight=False,
            soft_wrap=True,
        )
