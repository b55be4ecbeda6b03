"""Settings of a training run: all that decides the weights it ends with, and under `run` how it is carried out."""

import difflib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vlsm import storage
from vlsm.config import Settings, check_range
from vlsm.models import MODELS

Trainable = Literal["decoder", "lora", "all"]


class AugmentSettings(Settings):
    """Random changes of the training images, new in every epoch. The papers use none."""

    flip: bool = Field(False, description="left to right and top to bottom, each half of the time")
    rotate_degrees: float = Field(0, ge=0, le=180, description="up to so far, either way")
    scale: float = Field(0, ge=0, lt=1, description="up to this share smaller or larger")
    color: float = Field(0, ge=0, le=1, description="up to this share of brightness, contrast and saturation")

    @property
    def is_off(self) -> bool:
        """Whether every image stays as it is."""
        return self == AugmentSettings()


class DataSettings(Settings):
    """Which examples are seen, how often, and with which prompt."""

    prompt: str | dict[str, str] = Field(
        "p1", description="one of the kinds that records have; random; text:WORDS; or one of these per dataset"
    )
    sampling: Literal["proportional", "uniform"] | dict[str, float] = Field(
        "proportional", description="uniform: each dataset as often as any other; or a weight per dataset"
    )
    mask_threshold: int = Field(127, ge=0, le=254, description="brighter pixels of a mask file are foreground")
    skip_broken: bool = Field(False, description="leave out records whose files are of no use instead of stopping")
    max_pixels: int = Field(100_000_000, ge=1, description="larger images are refused before they are decoded")
    max_image_bytes: int = Field(1 << 30, ge=1, description="larger files are refused before they are read")
    augment: AugmentSettings = AugmentSettings()


class OptimSettings(Settings):
    """How the weights are found."""

    epochs: int = Field(50, ge=1, description="passes over the training examples")
    batch_size: int = Field(16, ge=1, description="examples of one optimiser step, over all workers together")
    lr: float = Field(1e-3, gt=0, description="learning rate of AdamW")
    tower_lr: float | None = Field(None, gt=0, description="of the pretrained towers, where they learn; lr unless told")
    weight_decay: float = Field(1e-3, ge=0, description="of AdamW")
    clip_norm: float | None = Field(0.5, gt=0, description="the longest gradient; null for any")
    dice_weight: float = Field(1.0, ge=0, description="of the Dice loss")
    ce_weight: float = Field(0.2, ge=0, description="of the cross entropy; 1 makes it BCE + Dice")
    schedule: Literal["constant", "cosine", "plateau"] = Field("cosine", description="of the learning rate")
    warmup_epochs: float = Field(0, ge=0, description="in which the learning rate rises from zero")
    plateau_factor: float = Field(0.1, gt=0, lt=1, description="by which plateau lowers the learning rate")
    plateau_patience: int = Field(5, ge=0, description="epochs without a better one that plateau waits")
    early_stop: int | None = Field(None, ge=1, description="epochs without a better one that end the run")
    monitor: Literal["dice", "loss"] = Field(
        "dice", description="of validation, the mean over datasets: what is better"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="on GPUs; a CPU computes in fp32")
    sync_batch_norm: bool = Field(False, description="batch statistics over all workers instead of each one's own")

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if not self.dice_weight + self.ce_weight:
            raise ValueError("optim.dice_weight and optim.ce_weight are both 0; one of them must weigh something")
        return self


class TrainRunSettings(Settings):
    """How a run is carried out: it may differ when a run is resumed."""

    workers: int | str | None = Field(
        None, description="processes with a model each, or MIN..MAX for what there is; one per GPU, or 1, unless told"
    )
    gpus_per_worker: float | None = Field(None, ge=0, description="1 where the cluster has GPUs, else 0, unless told")
    cpus_per_worker: float | None = Field(None, gt=0, description="1 beside a GPU, else most CPUs, unless told")
    micro_batch_size: int = Field(8, ge=1, description="examples at once per worker; gradients are accumulated")
    compile: bool = Field(False, description="torch.compile the model")
    fsdp: bool = Field(False, description="shard a model that learns as a whole over the workers")
    cache_images: bool | None = Field(
        None, description="keep decoded images in Ray's object store; where they take under a third unless told"
    )
    feature_cache_bytes: int = Field(
        0, ge=0, description="of frozen towers' output kept on each node's disk, where nothing is augmented"
    )
    checkpoint_steps: int | None = Field(None, ge=1, description="save within an epoch too, after so many steps")
    max_failures: int = Field(8, ge=0, description="deaths of workers that a run survives")
    mlflow: str | None = Field(None, description="tracking URI of an MLflow that metrics go to as well")
    wandb: str | None = Field(None, description="project of Weights & Biases that metrics go to as well")

    _check_workers = field_validator("workers")(check_range)


class TrainSettings(Settings):
    """A training run."""

    output: str
    datasets: dict[str, str] = Field({}, description="by name, as --dataset gives them")
    model: str | None = Field(None, description="one of `python -m vlsm.models`; needed without start_from")
    options: dict[str, Any] = Field(
        {}, description="of the model: --set options.image_size=224; `python -m vlsm.models NAME` lists them"
    )
    trainable: Trainable = Field("decoder", description="decoder, lora or all: what learns of pretrained towers")
    lora_rank: int = Field(8, ge=1, description="of the adapters of trainable=lora")
    start_from: str | None = Field(None, description="a checkpoint directory to go on from, instead of a model")
    external: dict[str, str] = Field(
        {}, description="datasets of which only the test split is used: --set external.NAME=URI"
    )
    seed: int = Field(0, ge=0, description="of weights, order, prompts and augmentation")
    start_over: bool = Field(False, description="forget an earlier run in OUTPUT")
    data: DataSettings = DataSettings()
    optim: OptimSettings = OptimSettings()
    run: TrainRunSettings = TrainRunSettings()

    @field_validator("datasets", "external", "start_from")
    @classmethod
    def _make_absolute(cls, value: Any) -> Any:
        """Workers have another working directory, and a rerun may have one too."""
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
            raise ValueError("give either a model, such as model=vlsm_a, or start_from=CHECKPOINT")
        if self.model is not None and self.model not in MODELS:
            near = difflib.get_close_matches(self.model, MODELS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown model {self.model!r}; {hint}known models: {', '.join(MODELS)}")
        if self.run.fsdp and self.trainable != "all":
            raise ValueError("run.fsdp is for trainable=all; frozen towers need no sharding")
        return self

    @model_validator(mode="after")
    def _check_datasets(self) -> Self:
        if not self.datasets:
            raise ValueError("there is nothing to train on: give --dataset NAME=URI once at least")
        if twice := self.datasets.keys() & self.external.keys():
            raise ValueError(f"{', '.join(sorted(twice))} is named both as a dataset and as an external one")
        if "mean" in self.datasets.keys() | self.external.keys():
            raise ValueError("a dataset may not be called mean, as the mean over datasets is")
        for key, value in (("data.prompt", self.data.prompt), ("data.sampling", self.data.sampling)):
            known = self.datasets | (self.external if key == "data.prompt" else {})
            if isinstance(value, dict) and (unknown := value.keys() - known.keys()):
                raise ValueError(f"{key} names {', '.join(sorted(unknown))}; datasets are {', '.join(known)}")
        if isinstance(self.data.sampling, dict) and not (
            all(weight >= 0 for weight in self.data.sampling.values()) and sum(self.data.sampling.values()) > 0
        ):
            raise ValueError("data.sampling must hold weights of 0 or more, one above 0 at least")
        return self
