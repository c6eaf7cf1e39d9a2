"""The arguments of `tools/train.py` and `tools/validate.py`: names, types, defaults and help, in one place.

Names follow timm's `train.py` wherever it has one. A YAML file sets any of them by its flat key, the command line
overrides the file (`visionattn.train.cli`), and Python code builds the dataclass directly.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from visionattn.train.errors import ConfigError

# ruff: noqa: RUF009 - _arg makes a dataclass field, as dataclasses.field does


def _arg(default: Any, text: str, *, bare: Any = None) -> Any:
    """A field with its help; ``bare`` is what `--name` without a value means."""
    return dataclasses.field(default=default, metadata={"help": text, "bare": bare})


def _mapping(text: str) -> Any:
    """A field of key=value pairs, none by default."""
    return dataclasses.field(default_factory=dict, metadata={"help": text, "bare": None})


Amp = Literal["none", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run. Values are checked when the object is made.

    Raises:
        ConfigError: a value out of its range, or two values that contradict each other.
    """

    # model
    model: str = _arg("biformer_t", "model name, as for timm.create_model")
    model_kwargs: dict[str, Any] = _mapping("further arguments of the model: --model-kwargs n_win=7 depths=[2,2,2,2]")
    num_classes: int | None = _arg(None, "classes of the head; default: as many as the training set has")
    in_chans: int = _arg(3, "channels of an input image")
    pretrained: bool = _arg(False, "start from the published weights")
    initial_checkpoint: str | None = _arg(None, "start from the weights in this file (.safetensors, .pth)")
    keep_classifier: bool = _arg(False, "with initial_checkpoint: load all but the classifier, for other classes")
    drop: float | None = _arg(None, "dropout before the classifier")
    drop_path: float | None = _arg(None, "stochastic depth rate of the last block")
    fuse: bool = _arg(False, "run timm's MaxViT, DaViT, ConViT or SHViT on the operators here")
    grad_checkpointing: bool = _arg(False, "recompute activations in the backward pass: less memory, more time")
    channels_last: bool = _arg(False, "channels-last memory layout")
    torchcompile: str | None = _arg(None, "compile the model with this back-end (bare flag: inductor)", bare="inductor")

    # data
    dataset: str = _arg("", "digits, torch/<name>, wds/, hfds/<name>, hfids/<name>; empty: a folder of images")
    data_dir: str | None = _arg(None, "root of the data set; for image folders it holds train/ and val/")
    train_split: str = _arg("train", "name of the training split")
    val_split: str = _arg("validation", "name of the validation split (a val/ or test/ folder is found too)")
    train_num_samples: int | None = _arg(None, "training images in the shards, where their info file does not say")
    val_num_samples: int | None = _arg(None, "validation images in the shards, where their info file does not say")
    class_map: str | None = _arg(None, "text file with one class name a line, in the order of the labels")
    input_key: str | None = _arg(None, "key of the image in shards or tables")
    target_key: str | None = _arg(None, "key of the label in shards or tables")
    dataset_download: bool = _arg(False, "let the reader download the data set")
    max_bad_images: int = _arg(100, "stop when more than this many images could not be read")
    cache_dir: str | None = _arg(None, "keep decoded training images in this folder, which grows large")
    cache_size: int = _arg(320, "shorter side to which larger images are shrunk in the cache, in pixels")
    workers: int = _arg(4, "data loading processes a training process; 0 loads in the training process itself")
    pin_mem: bool = _arg(True, "page-locked host memory for batches (used with a GPU only)")
    batch_size: int = _arg(128, "images in a forward pass of one process")
    global_batch_size: int | None = _arg(
        None, "images in an update over all processes and accumulation steps; fixes batch_size when set"
    )
    validation_batch_size: int | None = _arg(None, "images in a validation batch of one process; default: batch_size")

    # image size and normalisation; the defaults come from the model
    img_size: int | None = _arg(None, "side of a square input, in pixels")
    input_size: tuple[int, ...] | None = _arg(None, "input as channels height width; wins over img_size")
    crop_pct: float | None = _arg(None, "share of the resized validation image that the centre crop keeps")
    crop_mode: str | None = _arg(None, "validation crop: center, squash or border")
    mean: tuple[float, ...] | None = _arg(None, "mean of each channel (of values in 0..1)")
    std: tuple[float, ...] | None = _arg(None, "standard deviation of each channel")
    interpolation: str | None = _arg(None, "resampling for validation: bilinear, bicubic, ...")

    # augmentation and regularisation
    no_aug: bool = _arg(False, "resize and crop only")
    train_crop_mode: str | None = _arg(None, "training crop: rrc (random resized), rkrc or rkrr (keep the ratio)")
    train_interpolation: str = _arg("random", "resampling for training; random: bilinear or bicubic by chance")
    scale: tuple[float, ...] = _arg((0.08, 1.0), "range of the random crop's share of the area")
    ratio: tuple[float, ...] = _arg((3 / 4, 4 / 3), "range of the random crop's aspect ratio")
    hflip: float = _arg(0.5, "probability of a horizontal flip")
    vflip: float = _arg(0.0, "probability of a vertical flip")
    color_jitter: tuple[float, ...] | None = _arg((0.4,), "strength of brightness, contrast, saturation[, hue] jitter")
    aa: str | None = _arg(None, "automatic augmentation, e.g. rand-m9-mstd0.5-inc1")
    reprob: float = _arg(0.0, "probability of random erasing")
    remode: str = _arg("pixel", "random erasing fills with: const, rand (one colour) or pixel (noise)")
    recount: int = _arg(1, "rectangles that random erasing draws")
    aug_repeats: float = _arg(0, "repeated augmentation: copies of an image in an epoch; 0 switches it off")
    mixup: float = _arg(0.0, "alpha of mixup; 0 switches it off")
    cutmix: float = _arg(0.0, "alpha of cutmix; 0 switches it off")
    mixup_prob: float = _arg(1.0, "probability that a batch is mixed")
    mixup_switch_prob: float = _arg(0.5, "probability of cutmix where both are on")
    mixup_mode: Literal["batch", "pair", "elem"] = _arg("batch", "one mixture a batch, a pair or an element")
    mixup_off_epoch: int = _arg(0, "no mixing from this epoch on; 0: always")
    smoothing: float = _arg(0.1, "label smoothing")
    bce_loss: bool = _arg(False, "binary cross-entropy of each class in place of cross-entropy")
    bce_target_thresh: float | None = _arg(None, "with bce_loss: targets above this become 1, others 0")

    # distillation
    teacher_model: str | None = _arg(None, "learn from this model too, by timm's name; its token's head if it has one")
    teacher_path: str | None = _arg(None, "the teacher's weights; default: the published ones")
    distillation_type: Literal["soft", "hard"] = _arg("hard", "compare with the teacher's probabilities or first guess")
    distillation_alpha: float = _arg(0.5, "share of the teacher in the loss")
    distillation_tau: float = _arg(1.0, "temperature of soft distillation")

    # optimiser
    opt: str = _arg("adamw", "optimiser, by timm's name")
    opt_eps: float | None = _arg(None, "the optimiser's epsilon")
    opt_betas: tuple[float, ...] | None = _arg(None, "the optimiser's betas")
    opt_kwargs: dict[str, Any] = _mapping("further arguments of the optimiser")
    momentum: float = _arg(0.9, "momentum, where the optimiser has one")
    weight_decay: float = _arg(0.05, "weight decay; never on biases, norms and what the model exempts")
    layer_decay: float | None = _arg(None, "learning rate factor from each layer to the one below it")
    lr_scale: dict[str, Any] = _mapping(
        "factors of the learning rate for parameters whose name holds a text: --lr-scale downsample.offset=0.01"
    )
    clip_grad: float | None = _arg(None, "limit of the gradient; default: none")
    clip_mode: Literal["norm", "value", "agc"] = _arg("norm", "how the gradient is limited")
    grad_accum_steps: int = _arg(1, "forward and backward passes in one update")

    # schedule
    epochs: int = _arg(300, "epochs of the schedule, without the cool-down")
    sched: str = _arg("cosine", "schedule, by timm's name; none keeps the learning rate")
    sched_on_updates: bool = _arg(True, "change the learning rate at each update rather than each epoch")
    lr: float | None = _arg(None, "learning rate; default: lr_base * global batch / lr_base_size")
    lr_base: float = _arg(5e-4, "learning rate at a global batch of lr_base_size")
    lr_base_size: int = _arg(512, "the global batch to which lr_base belongs")
    lr_base_scale: Literal["linear", "sqrt"] = _arg("linear", "how the learning rate follows the global batch")
    warmup_lr: float = _arg(1e-6, "learning rate at the start of the warm-up")
    min_lr: float = _arg(1e-5, "learning rate at the end")
    warmup_epochs: float = _arg(5, "epochs of linear warm-up, part of epochs")
    cooldown_epochs: int = _arg(0, "epochs at min_lr after the schedule")
    decay_epochs: float | None = _arg(None, "step: epochs between decays; wsd: length of the decay")
    decay_milestones: tuple[int, ...] = _arg((90, 180, 270), "multistep: epochs at which to decay")
    decay_rate: float = _arg(0.1, "step, multistep: factor of a decay")

    # weights averaging
    model_ema: bool = _arg(False, "keep an exponential moving average of the weights, and evaluate it too")
    model_ema_decay: float = _arg(0.9998, "decay of the average at each update")
    model_ema_warmup: bool = _arg(False, "let the decay grow from 0 in the first updates")
    best_weights: Literal["auto", "raw", "ema"] = _arg(
        "auto", "weights that eval_metric ranks and model_best holds; auto: ema where there is one"
    )

    # run
    dry_run: bool = _arg(False, "print the whole recipe, what it costs and what is in the data, and train nothing")
    seed: int = _arg(42, "everything random in a run follows from it")
    amp: Amp = _arg("none", "mixed precision", bare="bf16")
    sync_bn: bool = _arg(False, "batch norm statistics over all processes")
    eval_metric: Literal["top1", "top5", "loss"] = _arg("top1", "metric that decides which checkpoint is best")
    output: str = _arg("output", "folder of all experiments")
    experiment: str | None = _arg(None, "folder of this one in it; default: date, time, model and image size")
    resume: str | None = _arg(
        None, "continue a run: its folder or one of its state files; bare or auto: this experiment's own, if any",
        bare="auto",
    )  # fmt: skip
    overwrite: bool = _arg(False, "start anew in a folder that holds a run, whose files are removed")
    recovery_interval: int = _arg(0, "save the state every so many updates too; 0: after each epoch only")
    time_limit: float | None = _arg(
        None, "minutes from the start of the run after which it must have saved its state and ended; it stops in time"
    )
    checkpoint_hist: int = _arg(3, "checkpoints to keep, the best ones")
    log_interval: int = _arg(50, "updates between two lines of the log, and between two checks of the loss")
    tensorboard: bool = _arg(True, "write event files to <experiment>/tb")
    progress: bool = _arg(True, "draw progress bars")

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        for name in (
            "batch_size", "cache_size", "grad_accum_steps", "epochs", "in_chans", "log_interval", "checkpoint_hist",
            "lr_base_size",
        ):  # fmt: skip
            _check(self, name, lambda value: value >= 1, "at least 1")
        for name in ("num_classes", "global_batch_size", "validation_batch_size", "img_size"):
            _check(self, name, lambda value: value is None or value >= 1, "at least 1")
        for name in (
            "workers", "max_bad_images", "warmup_epochs", "cooldown_epochs", "mixup", "cutmix", "aug_repeats",
            "weight_decay", "seed", "recovery_interval",
        ):  # fmt: skip
            _check(self, name, lambda value: value >= 0, "0 or more")
        for name in (
            "hflip",
            "vflip",
            "reprob",
            "mixup_prob",
            "mixup_switch_prob",
            "smoothing",
            "model_ema_decay",
            "distillation_alpha",
        ):
            _check(self, name, lambda value: 0 <= value <= 1, "between 0 and 1")
        for name in ("lr", "time_limit", "distillation_tau"):
            _check(self, name, lambda value: value is None or value > 0, "above 0")
        if self.input_size is not None and len(self.input_size) != 3:
            raise ConfigError(f"input_size takes three numbers, channels height width; got {self.input_size}")
        if self.best_weights == "ema" and not self.model_ema:
            raise ConfigError("best_weights is 'ema' but model_ema is off: switch model_ema on, or leave it at auto")
        if self.teacher_path is not None and self.teacher_model is None:
            raise ConfigError("teacher_path needs teacher_model: the name of the model whose weights it holds")
        for name, factor in self.lr_scale.items():
            if not isinstance(factor, int | float) or isinstance(factor, bool) or factor < 0:
                raise ConfigError(f"lr_scale takes factors of 0 or more, got {name}={factor!r}")
        if self.warmup_epochs > self.epochs:
            raise ConfigError(f"warmup_epochs ({self.warmup_epochs:g}) is longer than epochs ({self.epochs})")
        if self.mixing and self.batch_size % 2 and self.global_batch_size is None:
            raise ConfigError(f"mixup and cutmix pair up the images: batch_size must be even, got {self.batch_size}")

    @property
    def mixing(self) -> bool:
        """Whether batches are mixed."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """What `tools/validate.py` takes. Whatever is left out comes from the checkpoint itself, then from the model."""

    checkpoint: str | None = _arg(None, "weights to evaluate: a file written by tools/train.py, or an official one")
    model: str | None = _arg(None, "model name; needed where the checkpoint does not say")
    model_kwargs: dict[str, Any] = _mapping("further arguments of the model: --model-kwargs n_win=7")
    pretrained: bool = _arg(False, "evaluate the published weights of --model")
    checkpoints: tuple[str, ...] = _arg((), "several such files, each a row of a table; needs --sets")
    models: tuple[str, ...] = _arg((), "several names whose published weights are rows of the table too; needs --sets")
    sets: dict[str, Any] = _mapping(
        "ImageNet's sets and their folders: --sets imagenet=DIR real=DIR v2=DIR a=DIR r=DIR sketch=DIR c=DIR"
    )
    num_classes: int | None = _arg(None, "classes of the head")
    dataset: str | None = _arg(None, "digits, torch/<name>, wds/, hfds/<name>; empty: a folder of images")
    data_dir: str | None = _arg(None, "root of the data set")
    split: str | None = _arg(None, "split to evaluate; default: the validation split of the training run")
    num_samples: int | None = _arg(None, "images in the shards, where their info file does not say")
    class_map: str | None = _arg(None, "text file with one class name a line, in the order of the labels")
    input_key: str | None = _arg(None, "key of the image in shards or tables")
    target_key: str | None = _arg(None, "key of the label in shards or tables")
    dataset_download: bool = _arg(False, "let the reader download the data set")
    max_bad_images: int = _arg(100, "stop when more than this many images could not be read")
    batch_size: int = _arg(128, "images in a batch of one process")
    workers: int = _arg(4, "data loading processes; 0 loads in the main process")
    img_size: int | None = _arg(None, "side of a square input, in pixels")
    input_size: tuple[int, ...] | None = _arg(None, "input as channels height width; wins over img_size")
    crop_pct: float | None = _arg(None, "share of the resized image that the centre crop keeps")
    crop_mode: str | None = _arg(None, "center, squash or border")
    mean: tuple[float, ...] | None = _arg(None, "mean of each channel (of values in 0..1)")
    std: tuple[float, ...] | None = _arg(None, "standard deviation of each channel")
    interpolation: str | None = _arg(None, "resampling: bilinear, bicubic, ...")
    amp: Amp = _arg("none", "mixed precision", bare="bf16")
    channels_last: bool = _arg(False, "channels-last memory layout")
    torchcompile: str | None = _arg(None, "compile the model with this back-end (bare flag: inductor)", bare="inductor")
    results_file: str | None = _arg(None, "write the result to this .json or .csv file; a table also to .md")
    progress: bool = _arg(True, "draw a progress bar")

    def __post_init__(self) -> None:
        """Check that there is something to evaluate."""
        several = bool(self.checkpoints or self.models)
        if several and not self.sets:
            raise ConfigError("checkpoints and models make rows of a table: say on which --sets, as imagenet=DIR")
        if self.checkpoint is None and self.model is None and not several:
            raise ConfigError("nothing to evaluate: give --checkpoint FILE, or --model NAME with --pretrained")
        if self.checkpoint is None and not self.pretrained and not several:
            raise ConfigError(f"{self.model} would have random weights: give --checkpoint FILE or --pretrained")
        if self.checkpoint is not None and self.pretrained:
            raise ConfigError("--checkpoint and --pretrained both name weights: give one of them")
        _check(self, "batch_size", lambda value: value >= 1, "at least 1")
        _check(self, "workers", lambda value: value >= 0, "0 or more")
        endings = (".json", ".csv", ".md") if self.sets else (".json", ".csv")
        if self.results_file is not None and not self.results_file.endswith(endings):
            raise ConfigError(f"results_file must end in {' or '.join(endings)}, got {self.results_file!r}")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What `tools/compare.py` takes besides the arguments of training, which hold for every run."""

    configs: str = _arg("configs/cifar10", "folder of the recipes to compare; they may differ in the model alone")
    data_dir: str | None = _arg(None, "root of the data set, for all runs")
    output: str = _arg("output/compare", "folder of the runs")
    results: str | None = _arg(
        None, "the .json file of results, with a table (.md) and a plot (.png) beside it; default: in output"
    )
    label: str = _arg("", "what the results are, for their title: say here what was reduced")
    seeds: tuple[int, ...] = _arg((0, 1, 2), "train each model with each of these seeds")
    only: tuple[str, ...] = _arg((), "recipes to take, by their file names without .yaml; default: all")
    per_class: tuple[int, ...] | None = _arg(
        None, "take the first so many images of each class for training, and so many for validation"
    )
    time_limit: float | None = _arg(None, "minutes after which to stop in order; the same command continues")

    def __post_init__(self) -> None:
        """Check what can be checked before any run."""
        if not self.seeds:
            raise ConfigError("seeds takes at least one seed")
        if self.per_class is not None and (len(self.per_class) != 2 or min(self.per_class) < 1):
            raise ConfigError(f"per_class takes two numbers of images, for training and validation: {self.per_class}")
        if self.results is not None and not self.results.endswith(".json"):
            raise ConfigError(f"results must end in .json, got {self.results!r}")
        _check(self, "time_limit", lambda value: value is None or value > 0, "above 0")


def _check(cfg: Any, name: str, accept: Any, expected: str) -> None:
    value = getattr(cfg, name)
    if not accept(value):
        raise ConfigError(f"{name} must be {expected}, got {value}")
