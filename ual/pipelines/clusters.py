"""How tightly the hidden states of several models cluster by token: the same tokens for every model.

The samples are rendered once, as the first run renders them, so all models read the same tokens. One model is
in memory at a time, and of its hidden states only those of the chosen tokens are kept.
"""

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

import ual
from ual.config import run as configuration
from ual.config.run import LossConfig, RunConfig, named
from ual.data import Collator, TokenizedSample, tokenize, training_set
from ual.data.overlap import contents
from ual.data.render import IGNORE_INDEX
from ual.errors import UserError
from ual.evaluate import clusters
from ual.evaluate.clusters import Projection
from ual.files import shown, write_json, writing
from ual.models.load import load_tokenizer
from ual.models.states import states
from ual.pipelines import samples
from ual.pipelines.learner import Learner
from ual.records import Sample
from ual.report.clusters import write
from ual.runs.folder import File, RunFolder
from ual.runs.progress import Progress

RESULT, PAGE = "clusters.json", "clusters.html"
BASE = "base"
_RENDERED = ("chat_template", "chat_template_kwargs", "system_prompt", "train_on")
"""Keys of `data` by which two runs may train on other tokens of the same sample."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured; see `ual.evaluate.clusters` for all but `umap`."""

    classes: int = 20
    occurrences: int = 50
    least: int = 30
    neighbors: int = 10
    seed: int = 0
    resamples: int = 200
    umap: bool = False


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to measure: a run's base model, with the weights of the run or without them."""

    name: str
    place: str
    config: RunConfig
    trained: bool


@dataclass(frozen=True, slots=True)
class Result:
    """The figures, as clusters.json holds them, and the page."""

    summary: dict[str, Any]
    page: Path


@dataclass(frozen=True, slots=True)
class _Rendered:
    """Samples with their tokens, the document of each by id, and sentences about what was left out."""

    tokenizer: Any
    tokens: Mapping[str, TokenizedSample]
    documents: Mapping[str, str]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class _Occurrences:
    """Every loss token of the samples; arrays are [M]."""

    token: NDArray[np.int64]
    document: NDArray[np.int64]
    sample: list[str]
    position: NDArray[np.int64]

    def at(self, chosen: NDArray[np.int64]) -> "_Occurrences":
        of = [self.sample[i] for i in chosen]
        return _Occurrences(self.token[chosen], self.document[chosen], of, self.position[chosen])


def run(
    words: Sequence[str],
    output: Path,
    *,
    data: Sequence[str] = (),
    options: Options = Options(),
    chat_template: str | None = None,
    base: bool = True,
    command: Sequence[str] = (),
    trust_remote_code: bool = False,
    console: Console | None = None,
    cache: Path | None = None,
) -> Result:
    """Measure how tightly hidden states cluster by token; write clusters.json and clusters.html.

    Args:
        words: run folders, folders of models or hub names, each also as NAME=PATH.
        output: the folder to write into.
        data: files of samples, read as the first run reads its own; by default, the held-out samples of the
            first run, or else its training samples.
        options: see `Options`.
        chat_template: in place of the first run's.
        base: whether to add the base model of the first run.
        command: the words of the command line, for the page.
        trust_remote_code: run code from a model's repository.
        console: where progress is drawn; None is silent.
        cache: the folder of tokenized samples; None keeps none.

    Raises:
        UserError: there is no such model, a run has no weights, tokenizers differ, a sample is wrong, too few
            tokens are frequent enough, a state is not finite, or the folder cannot be written. All but the
            states are checked before weights are loaded.
    """
    if options.umap:
        clusters.check_umap()
    subjects, notes = _subjects(words, base=base)
    with writing("the analysis", output, "choose another --output"):
        output.mkdir(parents=True, exist_ok=True)
    _check_tokenizers(subjects, trust_remote_code)
    config, origin = _settings(subjects, data, chat_template)
    with Progress(console) as progress:
        rendered = _render(config, trust_remote_code, progress, cache, held_out=not data)
        every = _occurrences(rendered)
        limits = {name: getattr(options, name) for name in ("classes", "occurrences", "least", "seed")}
        found = every.at(clusters.choose(every.token, every.document, **limits))
        states_of = partial(_states, rendered, found, config, trust_remote_code, progress)
        kept = {of.name: states_of(of) for of in subjects}
        how = {name: getattr(options, name) for name in ("neighbors", "resamples", "seed")}
        task = progress.task("intervals", options.resamples * len(kept))
        compared = clusters.compare(kept, found.token, found.document, advance=task, **how)
    summary = {
        "data": origin,
        "models": _described(subjects, compared.measures),
        "differences": [asdict(difference) for difference in compared.differences],
        **_tokens(rendered, every, found),
        "projections": _projections(kept, options),
        "options": asdict(options),
        "notes": [*notes, *rendered.notes],
        "command": list(command),
        "version": ual.__version__,
    }
    with writing("the analysis", output, "free some space, or choose another --output"):
        write_json(output / RESULT, summary)
    return Result(summary, write(summary, output / PAGE))


# ---- models ----


def _subjects(words: Sequence[str], *, base: bool) -> tuple[list[Subject], list[str]]:
    """Return the models to measure, the base model first, and sentences about what is unusual."""
    found = [_subject(word) for word in words]
    notes = []
    runs = [of for of in found if of.trained]
    if runs:
        first = runs[0]
        untrained = {of.config.model.path for of in found if not of.trained}
        if base and first.config.model.path not in untrained:
            found.insert(0, replace(first, name=BASE, place=first.config.model.path, trained=False))
        for of in runs[1:]:
            if of.config.model.path != first.config.model.path:
                notes.append(f"{of.name} and {first.name} were trained from different base models.")
            if differing := [key for key in _RENDERED if _key(of, key) != _key(first, key)]:
                notes.append(
                    f"{of.name} was trained with another data.{differing[0]} than {first.name}, as which the "
                    "samples are rendered here."
                )
    names = [of.name for of in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        places = ", ".join(of.place for of in found if of.name == twice)
        raise UserError(
            f"two models have the name {twice!r}", place=places, remedy="name one of them: NAME=PATH"
        )
    return found, notes


def _key(of: Subject, key: str) -> Any:
    return getattr(of.config.data, key)


def _subject(word: str) -> Subject:
    name, equals, rest = word.partition("=")
    if not equals or Path(word).exists():
        name, rest = "", word
    path = Path(rest).expanduser()
    if (path / File.CONFIG).is_file():
        config = configuration.load(path / File.CONFIG)
        config = config.model_copy(update={"output_dir": str(path)})  # wherever the folder is by now
        if RunFolder(path).weights is None:
            remedy = f"finish it: ual train {path / File.CONFIG} --resume auto"
            raise UserError("this run has no trained weights", place=shown(path), remedy=remedy)
        return Subject(name or config.name or path.resolve().name, str(path), config, trained=True)
    problem = ""
    if path.is_dir():
        if not (path / "config.json").is_file():
            problem = "neither a run nor a model: the folder has no config.yaml and no config.json"
    elif path.exists():
        problem = "this is a file, not a folder"
    elif not rest or rest.startswith((".", "/", "~")) or rest.count("/") > 1:
        problem = "there is no such folder"
    if problem:
        remedy = "name a run folder of `ual train`, the folder of a model, or a model on the hub"
        raise UserError(problem, place=shown(path), remedy=remedy)
    raw = {"model": str(path) if path.is_dir() else rest, "data": {"train": rest}, "output_dir": rest}
    return Subject(name or path.resolve().name, rest, configuration.parse(raw), trained=False)


def _check_tokenizers(subjects: Sequence[Subject], trust_remote_code: bool) -> None:
    """Refuse models that do not tokenize a text alike; padding and templates may differ."""
    first: Any = None
    for of in subjects:
        try:
            tokenizer: Any = load_tokenizer(of.config.model, trust_remote_code=trust_remote_code)
        except UserError as error:
            raise UserError(error.problem, place=of.place, remedy=error.remedy) from error
        whole = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
        own = tokenizer.get_vocab(), *(whole.get(k) for k in ("model", "normalizer", "pre_tokenizer"))
        first = first or own
        if own != first:
            raise UserError(
                f"{of.name} and {subjects[0].name} have different tokenizers, so their tokens differ",
                place=f"{subjects[0].place}, {of.place}",
                remedy="compare models of one tokenizer",
            )


def _states(
    rendered: _Rendered,
    found: _Occurrences,
    config: RunConfig,
    trust_remote_code: bool,
    progress: Progress,
    of: Subject,
) -> NDArray[np.float32]:
    """Return the states [N, D] of the chosen tokens under one model, which is then freed."""
    # the template is the first run's: the model's own is not used, and a base model may have none
    own = of.config.model_copy(update={"data": config.data})
    learner = Learner.load(own, trained=of.trained, trust_remote_code=trust_remote_code)
    used = {*found.sample}
    kept = states(
        learner.model,
        [training_set.features(sample) for name, sample in rendered.tokens.items() if name in used],
        list(zip(found.sample, found.position.tolist(), strict=True)),
        Collator(learner.renderer.tokenizer.pad_token_id),
        batch_size=config.evaluation.batch_size,
        advance=progress.task(f"hidden states, {of.name}", len(used)),
    )
    del learner
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not np.isfinite(kept).all():
        raise UserError(
            f"the hidden states of {of.name} are not finite",
            place=of.place,
            remedy="its training diverged, or its dtype is too narrow",
        )
    return kept


# ---- tokens ----


def _settings(
    subjects: Sequence[Subject], data: Sequence[str], chat_template: str | None
) -> tuple[RunConfig, str]:
    """Return the configuration that reads and renders the samples, and where they are from, in words."""
    first = next((of for of in subjects if of.trained), None)
    if first is None and not data:
        raise UserError("models without a run have no samples", remedy="name samples with --data FILE")
    config = (first or subjects[0]).config
    of: dict[str, Any] = {"packing": False, "chat_template": chat_template or config.data.chat_template}
    if config.data.overlong == "refuse" or first is None:
        of["overlong"] = "truncate"  # states before the limit do not depend on what follows
    if data:
        of |= {"train": list(data), "eval": None, "eval_fraction": 0.0, "streaming": False}
        origin = named(list(data))
    elif config.data.eval is not None or config.data.eval_fraction:
        origin = f"held-out samples of {first.place if first else ''}"
    elif config.data.streaming:
        raise UserError(
            "this run streams its training samples and has no held-out samples",
            place=first.place if first else "",
            remedy="name samples with --data FILE",
        )
    else:
        origin = f"training samples of {first.place if first else ''}"
    # a loss that needs no options: targets here are the tokens of the responses
    update = {"data": config.data.model_copy(update=of), "loss": LossConfig(kind="sft")}
    return config.model_copy(update=update), origin


def _render(
    config: RunConfig, trust_remote_code: bool, progress: Progress, cache: Path | None, *, held_out: bool
) -> _Rendered:
    read = training_set.read(config)
    chosen = read.held_out if held_out and read.held_out else read.train
    notes = [f"{count} samples were dropped: {reason}." for reason, count in read.dropped.items()]
    if held_out and not read.held_out:
        notes.append("The tokens are of training samples, which a model may have memorized.")
    chosen = [replace(sample, options={}) for sample in chosen]
    tokenizer, renderer = samples.renderer(config, trust_remote_code=trust_remote_code)
    folder = None if cache is None else cache / "tokenized"
    tokens = tokenize(chosen, renderer, folder, progress.task("rendering", len(chosen)))
    limit = f"{renderer.max_length} tokens"
    if count := renderer.counts["truncated"]:
        notes.append(f"{count} samples were cut at {limit}.")
    if count := renderer.counts["dropped"]:
        notes.append(f"{count} samples were dropped by the limit of {limit}.")
    return _Rendered(tokenizer, tokens, {sample.id: _document(sample) for sample in chosen}, notes)


def _document(sample: Sample) -> str:
    """Return what makes samples one document: equal turns up to the first of the user.

    The turns of a conversation, and several answers to one question, are then one document. Their tokens have
    contexts that begin alike.
    """
    first = next(i for i, message in enumerate(sample.messages) if message.role == "user")
    return json.dumps([contents(message) for message in sample.messages[: first + 1]])


def _occurrences(rendered: _Rendered) -> _Occurrences:
    tokens, documents = rendered.tokens, rendered.documents
    numbers = {name: number for number, name in enumerate(dict.fromkeys(documents[id] for id in tokens))}
    at = {id: np.flatnonzero(of.labels[1:] != IGNORE_INDEX) + 1 for id, of in tokens.items()}
    nothing = [np.empty(0, np.int64)]
    return _Occurrences(
        np.concatenate(nothing + [of.labels[at[id]].astype(np.int64) for id, of in tokens.items()]),
        np.concatenate(nothing + [np.full(where.size, numbers[documents[id]]) for id, where in at.items()]),
        [id for id, where in at.items() for _ in where],
        np.concatenate(nothing + list(at.values())),
    )


# ---- the result ----


def _described(
    subjects: Sequence[Subject], measures: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    return [
        {
            "name": of.name,
            "path": of.place,
            "base": of.config.model.path,
            "trained": of.trained,
            "measures": {key: asdict(estimate) for key, estimate in measures[of.name].items()},
        }
        for of in subjects
    ]


def _tokens(rendered: _Rendered, every: _Occurrences, found: _Occurrences) -> dict[str, Any]:
    """Describe the classes, the most frequent first, and name the place of every state."""
    ids = np.unique(found.token)
    of_class = {int(id): every.token == id for id in ids}
    described = [
        {
            "id": id,
            "piece": rendered.tokenizer.convert_ids_to_tokens(id),
            "text": rendered.tokenizer.decode([id]),
            "occurrences": int(where.sum()),
            "documents": int(np.unique(every.document[where]).size),
        }
        for id, where in of_class.items()
    ]
    return {
        "tokens": sorted(described, key=lambda of: (-of["occurrences"], of["id"])),
        "occurrences": found.token.size // ids.size,
        "documents": int(np.unique(found.document).size),
        "places": {
            "token": found.token.tolist(),
            "document": found.document.tolist(),
            "sample": found.sample,
            "position": found.position.tolist(),
        },
    }


def _projections(kept: Mapping[str, NDArray[np.float32]], options: Options) -> dict[str, Any]:
    """Return the points of each projection by model; none if hidden sizes differ."""
    if len({x.shape[1] for x in kept.values()}) > 1:
        return {}
    kinds: dict[str, Callable[[], Projection]] = {"pca": lambda: clusters.principal_components(kept)}
    if options.umap:
        kinds["umap"] = lambda: clusters.umap_projection(kept, seed=options.seed)
    found = {}
    for kind, project in kinds.items():
        made = project()
        points = {name: np.round(of, 5).tolist() for name, of in made.points.items()}
        found[kind] = {"shares": list(made.shares), "points": points}
    return found
