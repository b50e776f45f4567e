"""The models of an evaluation: as a run has trained them, or as they were downloaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ual.config.evaluate import EvaluateConfig
from ual.config.run import ModelConfig, RunConfig, load, parse
from ual.data import Renderer
from ual.errors import UserError
from ual.pipelines.learner import Learner, renderer, weights_digest
from ual.runs.environment import fingerprint
from ual.runs.folder import File


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is evaluated; `renderer` drops what is too long for it."""

    name: str
    config: RunConfig
    trained: bool
    renderer: Renderer
    trust_remote_code: bool

    @classmethod
    def of(cls, name: str, model: ModelConfig, config: EvaluateConfig, *, trust_remote_code: bool) -> "Model":
        """Return a model of the configuration.

        Raises:
            UserError: there is no such model, it is an adapter without its run, or a run without weights.
        """
        folder, place = Path(model.path).expanduser(), f"configuration, models.{name}"
        trained = (folder / File.CONFIG).exists()
        if trained:
            if model != ModelConfig(path=model.path):
                raise UserError(
                    f"{folder} is a run, whose own configuration says how its model is loaded",
                    place=place,
                    remedy="give its folder alone",
                )
            of_run = _run(folder, place)
            weights_digest(of_run)  # raises an error if there are none
        elif (folder / "adapter_config.json").exists():
            raise UserError(
                f"{folder} is an adapter without its base model",
                place=place,
                remedy="name the folder of its run, or merge the adapter into the base model",
            )
        else:
            reading = config.model_dump(include={"chat_template", "chat_template_kwargs", "system_prompt"})
            raw = {"model": model.model_dump(), "data": {"train": "none", **reading}, "lora": None}
            of_run = parse(raw | {"output_dir": "none"}, place=place)
        assert config.date is not None
        of_run = of_run.on(config.date)
        try:
            made_by = renderer(of_run, fitting=False, trust_remote_code=trust_remote_code)
        except UserError as error:
            if trained or "chat_template" not in error.place:
                raise
            raise UserError(
                error.problem, place="configuration, chat_template", remedy=error.remedy
            ) from error
        return cls(name, of_run, trained, made_by, trust_remote_code)

    @property
    def source(self) -> str:
        """The run's folder, or the model's."""
        return self.config.output_dir if self.trained else self.config.model.path

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its answers, as JSON data."""
        model = self.config.model
        return {
            "weights": weights_digest(self.config) if self.trained else None,
            "lora": self.config.lora.model_dump() if self.trained and self.config.lora else None,
            "model": model.model_dump(exclude={"path", "tokenizer"}),
            "base": fingerprint(model.path) or model.path,
            "tokens": self.renderer.fingerprint,
        }

    def load(self) -> Learner:
        return Learner.load(self.config, trained=self.trained, trust_remote_code=self.trust_remote_code)


def _run(folder: Path, place: str) -> RunConfig:
    try:
        return load(folder / File.CONFIG).model_copy(update={"output_dir": str(folder)})
    except UserError as error:
        raise UserError(
            f"{folder} holds a configuration, and not that of a run: {error.problem.splitlines()[0]}",
            place=place,
            remedy="name the folder of a run of `ual train`, or of a model",
        ) from error
