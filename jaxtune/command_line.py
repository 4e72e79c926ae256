"""The arguments of a training program: a YAML file, then the command line, over the defaults of its config classes.

    defaults  <  settings of the shipped task (when no dataset is given)  <  --config file.yaml  <  command line

Flags and their help are generated from the dataclasses; no field name is in two of them, so the keys of the
YAML file are the plain field names. `Job` is that of `python -m jaxtune.train`; other programs have their own, with
other parts. This module imports neither jax nor transformers: --help is quick.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import tyro
import yaml

from jaxtune.config import (
    ClusterArguments,
    DataArguments,
    DataSource,
    LoadArguments,
    LoraArguments,
    SFTConfig,
    TrainingConfig,
)

# The job without a dataset: the shipped task, small enough for two CPU cores and a few minutes.
SHIPPED_TASK = {
    "output_dir": "outputs/orders",
    "max_length": 256,
    "packing": True,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 4,
    "max_steps": 60,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.05,
    "logging_steps": 5,
    "save_strategy": "no",
}

DESCRIPTION = """Fine-tune a language model with QLoRA.

Without --dataset it trains on the small task that ships with jaxtune (a sentence with an order in it becomes JSON),
with settings of its own for batch, length and learning rate; --dry_run shows them.
Settings may stand in a YAML file (--config), under the names below; the command line wins.

examples:
  python -m jaxtune.train --model_name Qwen/Qwen2.5-0.5B-Instruct
  python -m jaxtune.train --dataset rows.jsonl --learning_rate 2e-4 --packing --dry_run
  python -m jaxtune.train --config run.yaml --max_steps 100"""


class ConfigError(ValueError):
    """A setting that cannot be meant: reported in one line, exit status 2."""


@dataclasses.dataclass(frozen=True)
class BaseJob:
    """One run of a program; each has its own data and training."""

    PROGRAM: ClassVar[str]
    DESCRIPTION: ClassVar[str]
    SHIPPED: ClassVar[dict[str, Any]]
    """Settings of the shipped task, which runs without a dataset."""

    model: LoadArguments = dataclasses.field(default_factory=LoadArguments)
    lora: LoraArguments = dataclasses.field(default_factory=LoraArguments)
    data: DataSource = dataclasses.field(default_factory=DataSource)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    cluster: ClusterArguments = dataclasses.field(default_factory=ClusterArguments)
    config: Path | None = None
    """YAML file with settings under the names of this page."""
    traceback: bool = False
    """Show where an error came from."""

    @property
    def share_beside_jax(self) -> float:
        """Of a GPU's memory, for programs that this run starts beside JAX."""
        return 0.0

    @classmethod
    def parts(cls) -> dict[str, Any]:
        """The config classes by name."""
        return {
            field.name: field.type
            for field in dataclasses.fields(cls)
            if dataclasses.is_dataclass(field.type)
        }

    def settings(self) -> dict[str, Any]:
        """Every setting by name, as plain YAML values; no access token, and not where the processes are."""
        values: dict[str, Any] = {}
        for part in self.parts():
            values |= {} if part == "cluster" else dataclasses.asdict(getattr(self, part))
        values.pop("token")
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_yaml(self) -> str:
        """The settings as a file that --config reads back, one block per stage."""
        values = self.settings()
        blocks = []
        for part, cls in self.parts().items():
            names = [field.name for field in dataclasses.fields(cls) if field.name in values]
            block = {name: values[name] for name in names}
            if block:
                blocks.append(f"# {part}\n" + yaml.safe_dump(block, sort_keys=False, allow_unicode=True))
        return "\n".join(blocks)


@dataclasses.dataclass(frozen=True)
class Job(BaseJob):
    """One run of `python -m jaxtune.train`."""

    PROGRAM: ClassVar[str] = "python -m jaxtune.train"
    DESCRIPTION: ClassVar[str] = DESCRIPTION
    SHIPPED: ClassVar[dict[str, Any]] = SHIPPED_TASK

    data: DataArguments = dataclasses.field(default_factory=DataArguments)
    training: SFTConfig = dataclasses.field(default_factory=SFTConfig)
    dry_run: bool = False
    """Show the settings, the size of the model, the memory it will take and the data, then stop."""


def parse[J: BaseJob](arguments: Sequence[str], kind: type[J]) -> J:
    """The job that a command line asks for.

    Args:
        arguments: without the program's name.
        kind: of job.

    Raises:
        ConfigError: the YAML file is missing, malformed, or has an unknown or unsuitable setting.
        SystemExit: 0 after --help; 2 after a message about the command line.
    """
    # Both have to be known before the flags can be given their defaults.
    file, dataset = _value("--config", arguments), _value("--dataset", arguments)
    settings = read_yaml(Path(file) if file else None, kind)
    if dataset is None and settings.get("dataset") is None:
        settings = kind.SHIPPED | settings
    return _from_command_line(arguments, settings, kind)


def read_yaml(path: Path | None, kind: type[BaseJob]) -> dict[str, Any]:
    """The settings of a YAML file, its names checked; {} for None."""
    if path is None:
        return {}
    try:
        settings = yaml.load(path.read_text("utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: is no YAML: {' '.join(str(error).split())}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {path}: expected lines 'name: value', came a {type(settings).__name__}")
    parts = kind.parts()
    known = {field.name for cls in parts.values() for field in dataclasses.fields(cls)}
    foreign = parts["training"].FOREIGN.names
    for name in settings:
        if name not in known | foreign:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "; --help lists the names"
            raise ConfigError(f"--config {path}: unknown setting {name!r}{hint}")
    return settings


def _value(flag: str, arguments: Sequence[str]) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(flag + "="):
            return argument.removeprefix(flag + "=")
    return None


def _from_command_line[J: BaseJob](arguments: Sequence[str], settings: dict[str, Any], kind: type[J]) -> J:
    parts, left = {}, dict(settings)
    for part, cls in kind.parts().items():
        names = {field.name for field in dataclasses.fields(cls)}
        own = {name: left.pop(name) for name in list(left) if name in names}
        # What is left at the end are Hugging Face names that are no settings here; that config knows what to say.
        own |= left if part == "training" else {}
        try:
            parts[part] = cls(**own)
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from error
    job = tyro.cli(
        kind,
        prog=kind.PROGRAM,
        description=kind.DESCRIPTION,
        default=kind(**parts),
        args=list(arguments),
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    resume = job.training.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        training = dataclasses.replace(job.training, resume_from_checkpoint=resume.lower() == "true")
        job = dataclasses.replace(job, training=training)
    return job


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 2e-4 for text; here it is the number that everyone means."""


_Loader.yaml_implicit_resolvers = {
    key: list(resolvers) for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)
