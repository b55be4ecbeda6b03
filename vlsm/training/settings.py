"""Settings of a training run. They decide its final weights, except the group `run`: how the run is executed."""

import difflib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vlsm import storage
from vlsm.config import Settings, check_range
from vlsm.datasets.settings import DatasetSettings
from vlsm.models import MODELS

Trainable = Literal["decoder", "lora", "all"]


class AugmentSettings(Settings):
    """Random changes of the training images, drawn again in every epoch. The papers use none."""

    flip: bool = Field(False, description="mirror left to right and top to bottom, each with probability 0.5")
    rotate_degrees: float = Field(0, ge=0, le=180, description="largest random rotation either way, in degrees")
    scale: float = Field(0, ge=0, lt=1, description="largest random change of size, as a fraction")
    color: float = Field(0, ge=0, le=1, description="largest random change of brightness, contrast, saturation")

    @property
    def is_off(self) -> bool:
        """Whether no image is changed."""
        return self == AugmentSettings()


class DataSettings(DatasetSettings):
    """Choice of the training examples, how often they come, and their prompts."""

    prompt: str | dict[str, str] = Field(
        "p1", description="a kind of prompt in the records, such as p1; random; text:WORDS; or one of these per dataset"
    )
    sampling: Literal["proportional", "uniform"] | dict[str, float] = Field(
        "proportional", description="uniform: the same number of examples from each dataset; or a weight per dataset"
    )
    skip_broken: bool = Field(False, description="leave out records with broken files instead of stopping")
    augment: AugmentSettings = AugmentSettings()


class OptimSettings(Settings):
    """Loss, optimiser and schedule."""

    epochs: int = Field(50, ge=1, description="passes over the training examples")
    batch_size: int = Field(16, ge=1, description="examples of one optimiser step, of all workers together")
    lr: float = Field(1e-3, gt=0, description="learning rate of AdamW")
    tower_lr: float | None = Field(None, gt=0, description="learning rate of trainable pretrained towers; default: lr")
    weight_decay: float = Field(1e-3, ge=0, description="weight decay of AdamW")
    clip_norm: float | None = Field(0.5, gt=0, description="maximum norm of the gradient; null: no limit")
    dice_weight: float = Field(1.0, ge=0, description="weight of the Dice loss")
    ce_weight: float = Field(0.2, ge=0, description="weight of the cross entropy; 1 gives BCE + Dice")
    schedule: Literal["constant", "cosine", "plateau"] = Field("cosine", description="schedule of the learning rate")
    warmup_epochs: float = Field(0, ge=0, description="epochs in which the learning rate rises from zero")
    plateau_factor: float = Field(0.1, gt=0, lt=1, description="factor by which plateau lowers the learning rate")
    plateau_patience: int = Field(5, ge=0, description="epochs without improvement before plateau lowers it")
    early_stop: int | None = Field(None, ge=1, description="epochs without improvement before the run ends")
    monitor: Literal["dice", "loss"] = Field(
        "dice", description="validation metric that chooses the best epoch, as the mean over datasets"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="precision on GPUs; a CPU always uses fp32")
    sync_batch_norm: bool = Field(False, description="compute batch statistics over all workers (GPUs only)")

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if not self.dice_weight + self.ce_weight:
            raise ValueError("optim.dice_weight and optim.ce_weight are both 0; one of them must weigh something")
        return self


class TrainRunSettings(Settings):
    """How a run is executed. These settings may change when a run is resumed."""

    workers: int | str | None = Field(
        None, description="worker processes, or MIN..MAX depending on free resources; default: one per GPU, else 1"
    )
    gpus_per_worker: float | None = Field(
        None, ge=0, description="GPUs of a worker; default: 1 if the cluster has GPUs, else 0"
    )
    cpus_per_worker: float | None = Field(
        None, gt=0, description="CPUs of a worker; default: 1 with a GPU, else 3/4 of the CPUs"
    )
    micro_batch_size: int = Field(8, ge=1, description="examples per forward pass of a worker; gradients accumulate")
    compile: bool = Field(False, description="compile the model with torch.compile")
    fsdp: bool = Field(False, description="shard the model over the workers (trainable=all only)")
    cache_images: bool | None = Field(
        None, description="keep decoded images in Ray's object store; default: if they need less than 30 % of it"
    )
    feature_cache_bytes: int = Field(
        0,
        ge=0,
        description="disk cache per node for activations of frozen towers; not used with augmentation",
    )
    checkpoint_steps: int | None = Field(None, ge=1, description="also save within an epoch, after every N steps")
    max_failures: int = Field(8, ge=0, description="number of worker deaths that a run survives")
    mlflow: str | None = Field(None, description="also send metrics to the MLflow at this tracking URI")
    wandb: str | None = Field(None, description="also send metrics to this project in Weights & Biases")
    log_artifacts: Literal["none", "checkpoint", "report"] = Field(
        "checkpoint",
        description="files that mlflow and wandb get at the end: none; checkpoint: also its settings, metrics, curves; "
        "report: also the report, which shows images of patients",
    )

    _check_workers = field_validator("workers")(check_range)


class TrainSettings(Settings):
    """Settings of a training run."""

    output: str
    datasets: dict[str, str] = Field({}, description="datasets by name, as --dataset NAME=URI")
    model: str | None = Field(None, description="one of `python -m vlsm.models`; required without start_from")
    options: dict[str, Any] = Field(
        {}, description="options of the model: --set options.image_size=224; `python -m vlsm.models NAME` lists them"
    )
    trainable: Trainable = Field(
        "decoder", description="weights to train: decoder, lora (also adapters in towers), all"
    )
    lora_rank: int = Field(8, ge=1, description="rank of the adapters of trainable=lora")
    start_from: str | None = Field(None, description="start from a checkpoint directory instead of a model")
    external: dict[str, str] = Field(
        {}, description="datasets for the test only, not for training: --set external.NAME=URI"
    )
    seed: int = Field(0, ge=0, description="seed of weights, order, prompts and augmentation")
    start_over: bool = Field(False, description="delete an earlier run in OUTPUT and start again")
    data: DataSettings = DataSettings()
    optim: OptimSettings = OptimSettings()
    run: TrainRunSettings = TrainRunSettings()

    @field_validator("datasets", "external", "start_from")
    @classmethod
    def _make_absolute(cls, value: Any) -> Any:
        """Make locations absolute, since workers and later runs may have another working directory."""
        if isinstance(value, dict):
            return {name: storage.absolute(uri) for name, uri in value.items()}
        return value and storage.absolute(value)

    @field_validator("options")
    @classmethod
    def _make_local_sources_absolute(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {
            key: storage.absolute(source)
            if key.endswith(("source", "weights")) and isinstance(source, str) and Path(source).exists()
            else source
            for key, source in value.items()
        }

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if (self.model is None) == (self.start_from is None):
            both = f"model is {self.model!r} and start_from is {self.start_from!r}"
            raise ValueError(f"{both}; give either a model, such as model=vlsm_a, or start_from=CHECKPOINT")
        if self.model is not None and self.model not in MODELS:
            near = difflib.get_close_matches(self.model, MODELS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown model {self.model!r}; {hint}known models: {', '.join(MODELS)}")
        if self.run.fsdp and self.trainable != "all":
            raise ValueError(f"run.fsdp is for trainable=all; trainable is {self.trainable}, which needs no sharding")
        return self

    @model_validator(mode="after")
    def _check_datasets(self) -> Self:
        if not self.datasets:
            raise ValueError("there are no datasets to train on: give --dataset NAME=URI once at least")
        if twice := self.datasets.keys() & self.external.keys():
            raise ValueError(f"{', '.join(sorted(twice))} is named both as a dataset and as an external one")
        if "mean" in self.datasets.keys() | self.external.keys():
            raise ValueError("a dataset may not be called mean; that name is used for the mean over datasets")
        for key, value in (("data.prompt", self.data.prompt), ("data.sampling", self.data.sampling)):
            known = self.datasets | (self.external if key == "data.prompt" else {})
            if isinstance(value, dict) and (unknown := value.keys() - known.keys()):
                raise ValueError(f"{key} names {', '.join(sorted(unknown))}; datasets are {', '.join(known)}")
        if isinstance(self.data.sampling, dict) and not (
            all(weight >= 0 for weight in self.data.sampling.values()) and sum(self.data.sampling.values()) > 0
        ):
            raise ValueError("data.sampling must hold weights of 0 or more, one above 0 at least")
        return self
