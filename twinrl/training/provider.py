"""What a source of data and models gives a run: network, rows, start weights, validation, prompts, frozen modules.

A run has one :class:`Provider`. The laboratory's (:mod:`twinrl.training.laboratory`) trains networks of one's own on
labelled data with judges, the pretrained one (:mod:`twinrl.training.pretrained`) a family of diffusers models on a
prepared folder. Whoever is above asks the provider, and nobody asks which of the two it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from twinrl.backends.wrappers import WithoutTargetTime
from twinrl.evaluation import EvaluationConfig
from twinrl.evaluation.protocol import HeldOut
from twinrl.flow.conditions import Network
from twinrl.flow.reading import Reader
from twinrl.flow.source import Data
from twinrl.fsdp.initial import Outline
from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.gradients.gradient import over_ranks
from twinrl.rewards import Reward, build_reward
from twinrl.rewards.guide import Guide
from twinrl.run import checkpoints
from twinrl.sampling import SamplerConfig
from twinrl.terms import TERMS
from twinrl.training.runs import start_of
from twinrl.training.schema import RunConfig

if TYPE_CHECKING:
    from rich.table import Table as Shown


class ResultTable(Protocol):
    """A final table."""

    def as_dict(self) -> dict[str, Any]:
        """Plain mappings and lists, for JSON."""

    def write(self, path: Path) -> None:
        """The table as JSON."""

    def rich(self) -> "list[Shown]":
        """For the terminal."""


class FixedProtocol(Protocol):
    """Validation that stays the same between steps and runs.

    Attributes:
        config: sizes, seed, NFE.
        floor: what real images get, by plain names.
        row_names: short names of the rows of a grid.
    """

    config: EvaluationConfig
    floor: dict[str, float]

    @property
    def row_names(self) -> tuple[str, ...]: ...

    def evaluate(self, network: Network) -> dict[str, float]:
        """Metrics of one evaluation in training."""
        ...

    def draw_quality(self, network: Network, sampler: SamplerConfig, draw: int) -> float:
        """What ranks samples, of the fixed noise number ``draw``; smaller is better."""
        ...

    def grid_prompts(self) -> list[str]:
        """What the rows of a grid are asked for."""
        ...

    def grid(self, network: Network, sampler: SamplerConfig) -> Tensor:
        """(rows, columns, C, H, W) pixels: a row for each prompt, the same noise in a column."""
        ...

    def diversity(self, network: Network, sampler: SamplerConfig, n: int) -> tuple[str, Tensor]:
        """One prompt and at most (n, C, H, W) images of it from other noise."""
        ...


S = TypeVar("S", bound=Data)


@dataclass(frozen=True)
class Provider(ABC, Generic[S]):
    """Data and models of one run. Subclasses say what their kind of source gives.

    Attributes:
        settings: the configuration.
        source: the data, on ``device``.
        device: where the networks are.
        ranks: the processes that share them.
    """

    settings: RunConfig
    source: S
    device: torch.device
    ranks: Ranks = ALONE

    @classmethod
    @abstractmethod
    def load(cls, settings: RunConfig, device: torch.device) -> S:
        """The data on the device, built or read from the cache, with the models that belong to them.

        Raises:
            InputError: no such data, or data for another model.
        """

    @classmethod
    @abstractmethod
    def export(
        cls, settings: RunConfig, checkpoint: Path, folder: Path, lora: bool, dtype: Literal["float32", "bf16"] | None
    ) -> str:
        """Write the judged student of a checkpoint into a new or empty ``folder``, as a diffusers pipeline; in words,
        what rounding has cost.

        Arguments:
            settings: of the run. checkpoint: its folder.
            lora: write the adapters alone.
            dtype: of the written transformer; None = as trained.

        Raises:
            InputError: there is no pipeline or no adapters, the pretrained model is another by now, the folder is in
                use.
        """

    # --- training ---------------------------------------------------------------------------------------------

    @abstractmethod
    def reader(self, split: str) -> Reader:
        """What reads the rows of a split.

        Raises:
            InputError: ``data.rows`` asks for more than there are.
        """

    @abstractmethod
    def network(self) -> nn.Module:
        """The configured network with keyed initial weights, :meth:`told` what is configured.

        Raises:
            InputError: the network's sizes do not fit the latents, or pretrained weights cannot be read.
        """

    def told(self, network: nn.Module) -> nn.Module:
        """The network, with the target time hidden if so configured."""
        return network if self.settings.model.target_time else WithoutTargetTime(network)

    def outline(self) -> Outline | None:
        """The network of :meth:`network` without weights, and the files that hold them; None where there are none."""
        return None

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype | None:
        """Of the student's parameters; None: as they are."""

    def student(self, start_weights: bool = True) -> nn.Module:
        """The student at the start of training: network, start weights (unless a checkpoint brings them), in place.

        Raises:
            InputError: a term uses negative time and the network cannot tell it from positive time; start weights
                of another network.
        """
        settings = self.settings
        random = start_weights and settings.train.init == "random"
        network = self.ranks.network(lambda: self.prepared(self.network()), random, outline=self._prepared_outline)
        if any(TERMS.find(term.kind).negative_time for term in settings.terms.values()):
            self.check_branches_apart(network)
        if start_weights:
            self._start(network)
        return self.compiled(self.ranks.place(network, self.device, self.dtype).train())

    def prepared(self, network: nn.Module) -> nn.Module:
        """A new network as it is trained, in place; names and shapes of its tensors stay."""
        return network

    def _prepared_outline(self) -> Outline | None:
        if (found := self.outline()) is not None:
            self.prepared(found.network)
        return found

    def copy(self, student: nn.Module, average: bool = False, trained: bool = False) -> nn.Module:
        """A teacher, or a term's own network: see :meth:`twinrl.fsdp.ranks.Ranks.copy`."""
        return self.compiled(self.ranks.copy(student, average, trained))

    def compiled(self, network: nn.Module) -> nn.Module:
        """The network, its blocks compiled where that is configured."""
        if (backend := self.settings.machine.compile) is None:
            return network
        return self.ranks.compiled(network, self.settings.fsdp.blocks or self.block_classes(network), backend)

    def block_classes(self, network: nn.Module) -> tuple[str, ...] | None:
        """Names of the classes of the network's repeated blocks; None: they are to be found."""
        return None

    def check_branches_apart(self, network: nn.Module) -> None:
        """Raises InputError where (t, t) and (−t, −t) are the same to the network."""

    def _start(self, network: nn.Module) -> None:
        """Load the start weights that ``train.init`` names.

        Raises:
            InputError: it names nothing, a run without a checkpoint, or weights of another network.
        """
        origin = self.settings.train.init
        if origin == "random":
            return
        if origin == "teacher":
            self.start_as_teacher(network)
            return
        run = start_of(origin)
        folder = run.newest_checkpoint()
        checkpoint = self.ranks.load(folder)
        checkpoints.check_place(folder, checkpoint.state, run.settings().train.steps)
        self.ranks.load_module(network, checkpoint.judged, str(folder))
        checkpoints.check_finite(network.parameters(), checkpoint.state, folder, over_ranks)

    def start_as_teacher(self, network: nn.Module) -> None:
        """Give a new network the weights of the source's flow model, where it has not got them yet."""

    def under_adapters(self, student: nn.Module) -> nn.Module | None:
        """The pretrained model under a student's adapters, at no cost in memory; None where there are none."""
        return None

    # --- rewards and validation ----------------------------------------------------------------------------------

    @property
    def codec(self) -> Sequence[nn.Module]:
        """What encodes and decodes, and may wait on the host."""
        return ()

    def visitors(self, rewards: Iterable[Reward]) -> list[nn.Module]:
        """What has to be on the device while rewards are computed: their networks and the codec's."""
        return [*(module for reward in rewards for module in reward.modules().values()), *self.codec]

    @property
    def waiting(self) -> torch.device:
        """Where frozen models are between uses."""
        return torch.device("cpu") if self.settings.machine.offload else self.device

    def guide(self) -> Guide | None:
        """The reward that training follows; None where none is configured.

        Raises:
            InputError: its checkpoint is missing or foreign, or the estimator does not fit it.
        """
        settings = self.settings
        if settings.reward is None:
            return None
        reward = build_reward(settings.reward.model, self.source, "reward.model").to(self.waiting)
        visitors = self.visitors([reward])
        self.ranks.keep_frozen(visitors)
        return Guide(settings.reward, reward, self.source, settings.train.steps, settings.renoise_end(), visitors)

    def judges(self) -> dict[str, Reward]:
        """The rewards that only judge, by name."""
        configured = {} if self.settings.reward is None else self.settings.reward.held_out
        keyed = {f"reward.held_out.{name}": (name, reward) for name, reward in configured.items()}
        keyed |= {f"judges.{name}": (name, reward) for name, reward in self.settings.judges.items()}
        return {name: self._judge(reward, key) for key, (name, reward) in keyed.items()}

    def _judge(self, config: Any, key: str) -> Reward:
        return build_reward(config, self.source, key, training=False).to(self.waiting)

    @abstractmethod
    def protocol(self, split: HeldOut) -> FixedProtocol:
        """The fixed protocol that suits the data, with the rewards that only judge."""

    @abstractmethod
    def final(self, network: nn.Module) -> tuple[FixedProtocol, ResultTable]:
        """The final table of a network, as :meth:`judged` gives it, on held-out data; and the protocol behind it."""

    def judged(self, network: nn.Module) -> nn.Module:
        """The network as a protocol takes it, whose inputs are float32."""
        return network

    @abstractmethod
    def example_prompts(self, seed: int) -> list[str]:
        """Prompts to show a student with."""
