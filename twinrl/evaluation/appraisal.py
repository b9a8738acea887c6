"""What a laboratory is good for: its codec, judge, scorers and teacher on pictures that none of them was trained on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from twinrl.backends import build_network, network_key
from twinrl.evaluation.protocol import EvaluationConfig, LabelProtocol
from twinrl.evaluation.table import FinalTable, TableRow, real_rows, teacher_row
from twinrl.flow import draws
from twinrl.lab import Lab
from twinrl.lab.clip import ClipModel
from twinrl.lab.degrade import Degrade
from twinrl.sampling import euler, sample

STEPS = 50
GUIDANCE = 1.0
"""Strength g of F(c) + g·(F(c) − F(∅)) of the teacher's second row."""
COLUMNS = 12
CHUNK = 250
STAGES = ("judging real pictures", "sampling the teacher", "sampling the teacher with guidance")


@dataclass(frozen=True)
class Appraisal:
    """What was found on the test split.

    Attributes:
        round_trip: mean squared error of codec's pictures, in [−1, 1]².
        classes: K. share: of the commonest class among the judged: what guessing would get.
        retrieval: scorer → share of pictures whose own caption fits best among ``candidates``.
        preferred: scorer → share of pictures that are preferred to a degraded version.
        table: teacher without and with guidance, real pictures through the codec and as they are.
        pictures: rows of (K, 3, H, W) by name, to look at. captions: of their columns.
    """

    round_trip: float
    classes: int
    share: float
    retrieval: dict[str, float]
    candidates: int
    preferred: dict[str, float]
    table: FinalTable
    pictures: dict[str, Tensor]
    captions: list[str]

    @property
    def accuracy(self) -> float:
        """Share of real pictures that the judge recognises."""
        return self.table.rows[-1].metrics["accuracy"].value

    @property
    def decoded_accuracy(self) -> float:
        """The same after the codec."""
        return self.table.rows[-2].metrics["accuracy"].value


def appraise(lab: Lab, told: Callable[[str], object] = lambda stage: None) -> Appraisal:
    """Judge a laboratory as :mod:`twinrl.evaluation` judges a run, on its test split.

    Arguments:
        lab: on the CPU.
        told: what is done next, one of :data:`STAGES`.
    """
    told(STAGES[0])
    protocol = LabelProtocol(lab, EvaluationConfig(teacher_steps=STEPS), "test")
    images, captions = protocol.images.pixels, protocol.prompts
    retrieval, candidates = _retrieval(lab, images, captions)
    counts, preferred = protocol.labels.bincount(), _preferred(lab, images, captions)
    network = _teacher(lab)
    rows, held_out = list(_rows(protocol, network, told)), tuple(sorted(protocol.held_out))
    return Appraisal(
        round_trip=_round_trip(lab, images),
        classes=len(lab.classes),
        share=float(counts.max() / counts.sum()),
        retrieval=retrieval,
        candidates=candidates,
        preferred=preferred,
        table=FinalTable(rows, protocol.n, "test", 1, tuple(protocol.scorers), held_out),
        pictures=_shown(lab, protocol, network),
        captions=captions[:COLUMNS],
    )


def _teacher(lab: Lab) -> nn.Module:
    network = build_network(lab.network, lab, 0)
    network.load_state_dict(lab.teacher_weights(network, network_key(lab.network)))
    return network.eval()


def _rows(protocol: LabelProtocol, network: nn.Module, told: Callable[[str], object]) -> Iterator[TableRow]:
    """The teacher without and with guidance, then real pictures."""
    for stage, guidance in zip(STAGES[1:], (0.0, GUIDANCE), strict=True):
        told(stage)
        row = teacher_row(protocol, network, 1, guidance, None)
        yield replace(row, name=f"teacher, guidance {guidance:g}")
    yield from real_rows(protocol)


@torch.no_grad()
def _round_trip(lab: Lab, images: Tensor) -> float:
    errors = [(lab.decode(lab.encode(x)).clamp(-1, 1) - x).square().flatten(1).mean(1) for x in images.split(CHUNK)]
    return torch.cat(errors).mean().item()


@torch.no_grad()
def _retrieval(lab: Lab, images: Tensor, captions: list[str]) -> tuple[dict[str, float], int]:
    """Scorer → share of images to which their own caption fits best, and the number of different captions."""
    texts = list(dict.fromkeys(captions))
    own = torch.tensor([texts.index(caption) for caption in captions])
    found = {}
    for name, scorer in lab.scorers.items():
        assert isinstance(scorer, ClipModel)
        embedded = torch.cat([scorer.image_embedding(x) for x in images.split(CHUNK)])
        best = (embedded @ scorer.cached_text_embedding(texts).T).argmax(1)
        found[name] = (best == own).double().mean().item()
    return found, len(texts)


@torch.no_grad()
def _preferred(lab: Lab, images: Tensor, captions: list[str]) -> dict[str, float]:
    """Scorer → share of images whose score is above that of a degraded version."""
    texts = list(dict.fromkeys(captions))
    own = torch.tensor([texts.index(caption) for caption in captions])
    worse = Degrade(lab.models.codec)(images, own, draws.generator(0, "appraisal"))
    found = {}
    for name in ("lab_hps", "lab_judge"):
        clean, degraded = (lab.scorers[name](x, captions) for x in (images, worse))
        found[name] = (clean > degraded).double().mean().item()
    return found


@torch.no_grad()
def _shown(lab: Lab, protocol: LabelProtocol, network: nn.Module) -> dict[str, Tensor]:
    """Real pictures of as many classes as fit, their round trip, and what the teacher makes of their captions."""
    prompts, real = protocol.prompts[:COLUMNS], protocol.images.pixels[:COLUMNS]
    rows = {"real": real, "through the codec": lab.decode(lab.encode(real))}
    z, condition, null = protocol.noise(len(real), "appraisal"), lab.condition(prompts), lab.null_condition(len(real))
    for guidance in (0.0, GUIDANCE):
        latents = sample(network, z, condition, euler(STEPS), guidance=guidance, null=null)
        rows[f"teacher, guidance {guidance:g}"] = lab.decode(latents)
    return {name: row.clamp(-1, 1) for name, row in rows.items()}


# --- what is too weak ------------------------------------------------------------------------------------------------


def weaknesses(found: Appraisal) -> Iterator[str]:
    """What is too weak to study with, and what would help, each in two sentences; nothing where all is well."""
    teacher, guided, *_, floor = found.table.rows
    best = min(row.metrics["fd"].value for row in (teacher, guided))
    if found.classes < 2 or found.accuracy < max(0.6, found.share + 0.1):
        yield (
            f"The judge recognises {found.accuracy:.0%} of real pictures: accuracies say little. "
            "Fewer or clearer classes help (--label), and more pictures."
        )
    if found.decoded_accuracy < found.accuracy - 0.1:
        yield (
            f"After the codec the judge recognises {found.decoded_accuracy:.0%} instead of {found.accuracy:.0%}: "
            "samples cannot be better. More --minutes help."
        )
    if found.retrieval["lab_clip"] < 5 / found.candidates:
        yield (
            f"CLIP finds {found.retrieval['lab_clip']:.1%} of {found.candidates} captions, little more than by chance: "
            "prompts hardly count. Captions help that say what is to be seen, and more pictures."
        )
    for name, share in found.preferred.items():
        if share < 0.8:
            yield f"{name} prefers {share:.0%} of clean pictures to degraded ones: a weak reward. More pictures help."
    if not best <= 10 * floor.metrics["fd"].value:
        yield (
            f"The teacher's distance is {best / floor.metrics['fd'].value:.0f} times the floor: "
            "students start far from the pictures. More --minutes help, or more pictures."
        )
