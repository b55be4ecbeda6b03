"""Settings of a training run. They decide its final weights, except the group `run`: how the run is executed.

Batch norms are the exception. They see one micro-batch of one worker at a time, so with them the number of workers and
run.micro_batch_size change the weights too.
"""

import difflib
import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vlsm import storage
from vlsm.config import PlaceSettings, Settings, check_range
from vlsm.datasets.settings import DatasetSettings, SplitSettings
from vlsm.models import MODELS
from vlsm.models.options import MAX_ADAPTER_WIDTH, Adapted, Trainable

# The changes of a preset. The kinds are those of nnU-Net, Nature Methods 2021, arXiv 1809.10486, and hue; nnU-Net also
# has lower resolutions and gamma. The strengths are ours.
_PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "light": {"flip": True, "rotate_degrees": 15, "scale": 0.1, "color": 0.1},
    "strong": {
        "flip": True, "rotate_degrees": 45, "scale": 0.3, "color": 0.3, "hue": 0.03, "blur": 0.2, "noise": 0.04,
    },
}  # fmt: skip


class AugmentSettings(Settings):
    """Random changes of the training images, drawn again in every epoch. The papers use none."""

    preset: Literal["none", "light", "strong"] = Field(
        "none", description="values of the settings below that are not set; strong for training from scratch"
    )
    flip: bool = Field(False, description="mirror left to right and top to bottom, each with probability 0.5")
    rotate_degrees: float = Field(0, ge=0, le=180, description="largest random rotation either way, in degrees")
    scale: float = Field(0, ge=0, lt=1, description="largest random change of size, as a fraction")
    color: float = Field(0, ge=0, le=1, description="largest random change of brightness, contrast, saturation")
    hue: float = Field(0, ge=0, le=0.5, description="largest random change of hue, as a part of the colour circle")
    blur: float = Field(0, ge=0, le=1, description="probability of a Gaussian blur of 0.5 to 1.5 pixels")
    noise: float = Field(0, ge=0, le=1, description="largest standard deviation of Gaussian noise; white is 1")

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, tree: Any) -> Any:
        preset = tree.get("preset") if isinstance(tree, dict) else None
        return _PRESETS[preset] | tree if isinstance(preset, str) and preset in _PRESETS else tree

    @property
    def is_off(self) -> bool:
        """Whether no image is changed."""
        return self.model_copy(update={"preset": "none"}) == AugmentSettings()


class DataSettings(DatasetSettings):
    """Choice of the training examples, how often they come, and their prompts."""

    prompt: str | dict[str, str] = Field(
        "p1", description="a kind of prompt in the records, such as p1; random; text:WORDS; or one of these per dataset"
    )
    sampling: Literal["proportional", "uniform"] | dict[str, float] = Field(
        "proportional", description="uniform: the same number of examples from each dataset; or a weight per dataset"
    )
    learn_from: Literal["train", "val"] = Field(
        "train",
        description="val: learn from half of the val records, choose the best epoch by the other half, and leave out "
        "the train records; for a stack, whose members know those",
    )
    negatives: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of negative examples in an epoch: images without the finding, whose mask is empty; they or "
        "the others repeat to reach it; 0: none; null: as many as there are",
    )
    split: SplitSettings = SplitSettings()
    skip_broken: bool = Field(False, description="leave out records with broken files instead of stopping")
    tile_size: int | None = Field(
        None,
        ge=8,
        description="train, validate and test on square windows of this side in pixels, one of each image, drawn again "
        "in every epoch; for a checkpoint that segments with the same tile.size; null: whole images",
    )
    augment: AugmentSettings = AugmentSettings()


class OptimSettings(Settings):
    """Loss, optimiser and schedule."""

    epochs: int = Field(50, ge=1, description="passes over the training examples")
    batch_size: int = Field(16, ge=1, description="examples of one optimiser step, of all workers together")
    optimizer: Literal["adamw", "adam"] = Field(
        "adamw", description="adamw, or adam, whose decay is part of the gradient"
    )
    lr: float = Field(1e-3, gt=0, description="highest learning rate")
    tower_lr: float | None = Field(None, gt=0, description="learning rate of trainable pretrained towers; default: lr")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor from each block of a trainable tower to the block before it; 1: equal rates",
    )
    weight_decay: float = Field(1e-3, ge=0, description="weight decay; norms and biases do not decay")
    decay_all: bool = Field(False, description="norms and biases decay too, as in the papers")
    clip_norm: float | None = Field(0.5, gt=0, description="maximum norm of the gradient; null: no limit")
    dice_weight: float = Field(1.0, ge=0, description="weight of the Dice loss")
    ce_weight: float = Field(0.2, ge=0, description="weight of the cross entropy; 1 gives BCE + Dice")
    schedule: Literal["constant", "cosine", "plateau"] = Field("cosine", description="schedule of the learning rate")
    warmup_epochs: float = Field(0, ge=0, description="epochs in which the learning rate rises to its highest value")
    plateau_factor: float = Field(0.1, gt=0, lt=1, description="factor by which plateau lowers the learning rate")
    plateau_patience: int = Field(5, ge=0, description="epochs without improvement before plateau lowers it")
    plateau_monitor: Literal["dice", "loss"] | None = Field(
        None, description="validation metric that plateau watches; default: monitor"
    )
    early_stop: int | None = Field(None, ge=1, description="epochs without improvement before the run ends")
    min_delta: float = Field(0, ge=0, description="smallest change that early_stop counts as an improvement")
    min_epochs: int = Field(1, ge=1, description="epochs that early_stop does not cut short")
    monitor: Literal["dice", "loss"] = Field(
        "dice", description="validation metric for the best epoch and early_stop, as the mean over datasets"
    )
    val_loss: Literal["training", "ce"] = Field(
        "training", description="loss that validation measures: the training's, or its cross entropy alone"
    )
    val_flip: bool = Field(
        False, description="validate and test with the mean of an image and its mirror image, as a member with flip"
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="validate and keep a moving average of the weights with this decay, such as 0.999"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="precision on GPUs; a CPU always uses fp32")
    sync_batch_norm: bool = Field(False, description="batch norms see the micro-batches of all workers together (GPUs)")

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if not self.dice_weight + self.ce_weight:
            raise ValueError("optim.dice_weight and optim.ce_weight are both 0; one of them must weigh something")
        return self


class TrainRunSettings(PlaceSettings):
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
    micro_batch_size: int = Field(
        8,
        ge=1,
        description="examples per forward pass of a worker; gradients accumulate, but batch norms see only these",
    )
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
    model: str | None = Field(None, description="one of `vlsm models`; required without start_from")
    options: dict[str, Any] = Field(
        {}, description="options of the model: --set options.image_size=224; `vlsm models NAME` lists them"
    )
    trainable: Trainable = Field(
        "decoder",
        description="weights to train: decoder; lora or dora: also low-rank changes of the towers, which cost nothing "
        "later; adapters: also small layers in the towers, which stay in the model; all",
    )
    lora_rank: int = Field(8, ge=1, description="rank of trainable=lora and dora")
    adapt: Adapted = Field("image", description="towers that trainable=lora, dora and adapters adapt")
    adapter_width: int = Field(
        64, ge=1, le=MAX_ADAPTER_WIDTH, description="channels inside each layer of trainable=adapters"
    )
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
        """Make locations absolute: the sources that exist here, and the checkpoints of a stack."""

        def locate(key: str, source: Any) -> Any:
            if key == "members" and isinstance(source, list | tuple):
                return [storage.absolute(uri) if isinstance(uri, str) else uri for uri in source]
            is_source = key.endswith(("source", "weights")) and isinstance(source, str)
            return storage.absolute(source) if is_source and Path(source).exists() else source

        return {key: locate(key, source) for key, source in value.items()}

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if (self.model is None) == (self.start_from is None):
            both = f"model is {self.model!r} and start_from is {self.start_from!r}"
            more = "" if self.datasets else "; there are no datasets either: give --dataset NAME=URI once at least"
            raise ValueError(f"{both}; give either a model, such as model=vlsm_a, or start_from=CHECKPOINT{more}")
        if self.model is not None and self.model not in MODELS:
            near = difflib.get_close_matches(self.model, MODELS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown model {self.model!r}; {hint}known models: {', '.join(MODELS)}")
        if self.run.fsdp and self.optim.ema_decay is not None:
            raise ValueError("optim.ema_decay does not work with run.fsdp=true, which shards the weights; unset one")
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
            all(weight >= 0 for weight in self.data.sampling.values())
            and 0 < sum(self.data.sampling.values()) < math.inf
        ):
            raise ValueError("data.sampling must hold finite weights of 0 or more, one above 0 at least")
        return self
