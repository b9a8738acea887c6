"""Pretrained families: a diffusers pipeline and the folder that was prepared for it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from twinrl.backends.families.family import Family, FrozenTeacher
from twinrl.backends.families.lora import first_values
from twinrl.backends.wrappers import WithoutTargetTime, unwrapped
from twinrl.config.errors import InputError
from twinrl.evaluation import PromptProtocol, PromptTable
from twinrl.evaluation.protocol import HeldOut
from twinrl.fsdp import initial, wrap
from twinrl.fsdp.initial import Outline, SafetensorsPart
from twinrl.machine import float8
from twinrl.machine.dtypes import DTYPES, MASTER_DTYPES
from twinrl.run import checkpoints, fit
from twinrl.training import sources
from twinrl.training.provider import Provider
from twinrl.training.schema import RunConfig

if TYPE_CHECKING:
    from twinrl.data.prepared import FolderRows, FolderSource


class PretrainedModels(Provider["FolderSource"]):
    """A family of pretrained models on prepared images, or on prompts alone."""

    @classmethod
    def load(cls, settings: RunConfig, device: torch.device) -> "FolderSource":
        family = settings.model.family_class.load(settings.model.pretrained)
        source = sources.load(settings.data.source, settings.data.place, family)
        return source.to(str(device), settings.machine.offload)

    @classmethod
    def export(
        cls, settings: RunConfig, checkpoint: Path, folder: Path, lora: bool, dtype: Literal["float32", "bf16"] | None
    ) -> str:
        if lora and settings.model.lora is None:
            raise InputError("the run trained no adapters", fix="leave --lora out: the whole model is its student")
        from twinrl.backends.families import export
        from twinrl.sampling.scheduler import TwinFlowScheduler

        export.claim(folder)
        adapted, base = settings.model.lora is not None, str(settings.model.path)
        written = DTYPES[dtype or settings.model.dtype]
        costs = export.Costs(written)
        student, family = load_student(settings, checkpoint, None if adapted else costs.see)
        if lora:
            export.export_lora(student, family, folder, base=base, config=settings.model.pretrained)
            return "in float32; nothing is rounded"
        chosen = None if adapted and dtype is None else written
        export.export(student, family, folder, TwinFlowScheduler(), base=base, dtype=chosen, costs=costs)
        return f"{costs.written}{costs.remedy(adapted)}"

    def reader(self, split: str) -> "FolderRows":
        settings = self.settings
        dtype = MASTER_DTYPES[settings.train.precision]
        return self.source.reader(split, self.device, dtype, settings.branches, settings.data.row_multiple)

    def network(self) -> nn.Module:
        """With its pretrained weights, in ``model.dtype``."""
        return self.told(self.source.family.network(self.settings.model.pretrained, self.settings.seed))

    def outline(self) -> Outline:
        """As :meth:`network` makes it.

        Raises:
            InputError: the pretrained weights cannot be read, or do not fit.
        """
        family, config, seed = self.source.family, self.settings.model.pretrained, self.settings.seed
        inner = family.outline(config)
        before = "transformer." if self.settings.model.target_time else "network.transformer."
        stored = SafetensorsPart(family.files())
        origins = inner.transformer.origins(stored.shapes(), family.folder / family.PART)
        weights = initial.Pretrained(
            stored,
            {before + name: origin for name, origin in origins.items()},
            lambda name, shape: first_values(name.removeprefix(before), shape, seed),
            family.dtype_of(config),
        )
        return Outline(self.told(inner), self.block_classes(inner), weights)

    def block_classes(self, network: nn.Module) -> tuple[str, ...]:
        return tuple(sorted(cls.__name__ for cls in self.source.family.block_classes(unwrapped(network))))

    def prepared(self, network: nn.Module) -> nn.Module:
        if self.settings.model.float8:
            float8.convert(wrap.blocks_of(network, self.block_classes(network)))
        return network

    @property
    def dtype(self) -> torch.dtype | None:
        """A family brings its own."""
        precision = self.settings.train.precision
        return MASTER_DTYPES[precision] if precision == "float64" else None

    def under_adapters(self, student: nn.Module) -> nn.Module | None:
        if self.settings.model.lora is None:
            return None
        return FrozenTeacher(unwrapped(student))

    @property
    def codec(self) -> Sequence[nn.Module]:
        return self.source.codec

    def protocol(self, split: HeldOut) -> PromptProtocol:
        """On the validation split alone; the reward that training follows judges, too: the data have no scorers."""
        settings, judges, followed = self.settings, self.judges(), {}
        if settings.reward is not None:
            followed[settings.reward.model.kind] = self._judge(settings.reward.model, "reward.model")
        images = None
        if settings.evaluation.reference is not None:
            from twinrl.rewards import inception

            images = inception.reference(settings.evaluation.reference, settings.evaluation.inception, self.device)
            images.network.to(self.waiting)
        visitors = self.visitors([*judges.values(), *followed.values()])
        visitors += [] if images is None else [images.network]
        self.ranks.keep_frozen([*visitors, *self.source.encoders])
        return PromptProtocol(self.source, settings.evaluation, self.device, judges, followed, images, visitors)

    def final(self, network: nn.Module) -> tuple[PromptProtocol, PromptTable]:
        """On the validation split, without a teacher."""
        protocol = self.protocol("validation")
        return protocol, PromptTable.of(protocol, network)

    def example_prompts(self, seed: int) -> list[str]:
        """Some captions of the validation split."""
        split = self.source.splits["validation"]
        return split.captions(range(min(4, len(split))))


def load_student(
    settings: RunConfig, folder: Path, see: Callable[[Tensor, Tensor], object] | None = None
) -> tuple[Any, Family]:
    """The judged student of a checkpoint, and the pipeline that it started from; without the data, which may be gone.

    Arguments:
        settings: of the run. folder: of the checkpoint.
        see: is shown each tensor of a student that was trained whole, in float32, and how far training has moved it;
            such a student comes as precisely as it was kept, others in ``model.dtype``.

    Raises:
        InputError: no such pipeline, or not the one of the run; a corrupted checkpoint.
    """
    from twinrl.data.prepared import model_unchanged

    checkpoint, family = checkpoints.load(folder), settings.model.family_class.load(settings.model.pretrained)
    if not model_unchanged(checkpoint.state["content_hash"], family):
        raise InputError(
            f"{settings.model.path} is not the model that the run started from", got="files of another content",
            fix="give back the files of then: the student was trained on them",
        )  # fmt: skip
    config = settings.model.pretrained
    if see is not None and torch.float32 in {value.dtype for value in checkpoint.judged.values()}:
        config = config.model_copy(update={"dtype": "float32"})
    network = family.network(config, settings.seed)
    whole = network if settings.model.target_time else WithoutTargetTime(network)
    if see is not None:
        own, trained = whole.state_dict(), dict(whole.named_parameters())
        for name, value in checkpoint.judged.items():
            if name in trained and own[name].shape == value.shape:
                start = own[name].to(DTYPES[settings.model.dtype]).float()
                see(value.float(), value.float() - start)
    formats = dict.fromkeys(whole.state_dict(), MASTER_DTYPES[settings.train.precision])
    fit.load_module(whole, checkpoint.judged, str(folder), formats=formats)
    checkpoints.check_finite(whole.parameters(), checkpoint.state, folder)
    return network.eval(), family
