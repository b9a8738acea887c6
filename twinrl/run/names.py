"""Every metric name that twinrl writes, in one place. Imports nothing, so analysis can use it anywhere."""

LOSS_TOTAL = "loss/total"
"""Sum of the weighted terms, as it is minimised."""
GRAD_TOTAL_RAW = "grad/total/norm_raw"
"""Norm of the summed gradient, after the terms' rules and before the sum's own."""
GRAD_TOTAL_CLIPPED = "grad/total/norm_clipped"
"""Norm of the gradient that the optimizer gets."""
CLAMP_RCGM = "clamp/rcgm_frac"
"""Share of the elements of the residual R beyond ±κ, in [0, 1]."""
CLAMP_DELTA_V = "clamp/delta_v_frac"
"""Share of the elements of Δv beyond its clamp, in [0, 1]."""
DELTA_V_RMS = "delta_v/rms"
"""Root mean square of Δv: how far the fake branch is from the real one."""
CURVATURE_RMS = "curvature/rms"
"""Root mean square of (t − r)·dF/dt: how far the average velocity is from the instantaneous one."""
RENOISE_ALPHA = "renoise/alpha"
"""α of a Beta renoise at this step."""
RENOISE_BETA = "renoise/beta"
"""β of a Beta renoise at this step."""
RENOISE_LOCATION = "renoise/location"
"""Mean of the logit of a logit-normal renoise at this step."""
RENOISE_SCALE = "renoise/scale"
"""Deviation of the logit of a logit-normal renoise at this step."""
RENOISE_T_MEAN = "renoise/t_mean"
"""Mean of the renoise law at this step, in [0, 1]."""
REWARD_MEAN = "reward/mean"
"""Mean score of the samples that the reward saw in training."""
REWARD_STD = "reward/std"
"""Deviation of these scores over the batch."""
REWARD_WEIGHT = "reward/weight"
"""The reward's scheduled weight at this step."""
REWARD_NONFINITE = "reward/nonfinite_frac"
"""Share of the images that the reward gave no number for, in [0, 1]."""
REWARD_GRAD_NORM = "reward/grad/norm"
"""Norm of a sample's latent reward gradient, mean over the samples."""
REWARD_GRAD_SNR = "reward/grad/snr"
"""Signal over noise of an estimated gradient, from the spread of its directions."""
REWARD_GRAD_COSINE = "reward/grad/cosine"
"""Cosine of the estimated latent gradient to the exact one, in [−1, 1]."""
REWARD_GRAD_NORM_RATIO = "reward/grad/norm_ratio"
"""Norm of the estimated latent gradient over η times the exact one; 1 is right."""
REWARD_ROUNDTRIP = "reward/grad/roundtrip"
"""Root mean square of z − E(D(z)): the codec's round-trip error."""
LR = "opt/lr"
"""Learning rate of this step."""
RMS_MAX = "opt/rms_max"
"""Largest RMS_t over the tensors: √mean(g²/max(v, ε²)), from the optimizer's second moment v."""
UPDATE_RATIO = "opt/update_ratio"
"""Norm of the update over norm of the weights."""
UNMOVED = "opt/unmoved_frac"
"""Share of the weights in bf16 that the step leaves as they are, in [0, 1]."""
UNMOVED_MOMENTS = "opt/unmoved_moments_frac"
"""The same share of their second moments."""
VAL_QUALITY = "val/quality"
"""What policies and verdicts act on;
smaller is better. The lab: kernel distance of 1-NFE samples in the judge's features."""
VAL_OBJECTIVE = "val/objective"
"""The training objective on validation rows, as the published run validated."""
VAL_OBJECTIVE_NONFINITE = "val/objective_nonfinite_frac"
"""Share of the validation rows whose objective is not finite."""
VAL_VELOCITY_MSE = "val/velocity_mse"
"""Mean square of F(x_t, t, t) − (z − x) on fixed rows and times, without reward or guidance."""
SKIPPED = "event/skipped"
"""1 at a step that was dropped by a policy."""
STEP_SECONDS = "perf/step_seconds"
"""Wall-clock seconds of the step, without validation."""
VALIDATION_SECONDS = "perf/validation_seconds"
"""Wall-clock seconds of the validation after the step."""


RESERVED = ("loss/", "grad/", "opt/", "val/", "perf/", "event/", "own/")
"""How names begin that no component of one's own may log under: the trainer does."""


def loss(term: str) -> str:
    """Unweighted loss of a term, as it enters the total up to its weight."""
    return f"loss/{term}"


def grad(term: str, quantity: str) -> str:
    """Per-term gradient telemetry; ``quantity`` is norm_raw, norm_clipped, clip_coef or share."""
    return f"grad/{term}/{quantity}"


def cosine(first: str, second: str) -> str:
    """Cosine between the gradients of two terms, in [−1, 1]."""
    return f"grad/cos/{first}__{second}"


def val(quantity: str, nfe: int | None = None) -> str:
    """Validation metrics; ``nfe`` names the number of network evaluations of the samples judged."""
    return f"val/{quantity}" if nfe is None else f"val/{quantity}_{nfe}nfe"


def guided(quantity: str, nfe: int) -> str:
    """Validation metrics of samples made with guidance."""
    return f"val/guided/{quantity}_{nfe}nfe"


def reward_of(member: str, quantity: str) -> str:
    """Of a member of an ensemble whose gradient is taken apart; ``quantity`` is mean (its part of the score) or
    grad_norm (as of :data:`REWARD_GRAD_NORM`)."""
    return f"reward/{member}/{quantity}"


def own(term: str, quantity: str) -> str:
    """Of the network that a term owns, at its last step before the student's; ``quantity`` is loss or norm."""
    return f"own/{term}/{quantity}"


def event(kind: str) -> str:
    """1 at the step of an event of ``kind``, e.g. nonfinite."""
    return f"event/{kind}"


def content(statistic: str, nfe: int) -> str:
    """Mean of a statistic of the samples' pictures, in deviations of real ones; 0 is as these are."""
    return val(f"content/{statistic}", nfe)


def accuracy(label: str, nfe: int) -> str:
    """Share of the samples of class ``label`` that the judge recognises as that class."""
    return f"val/accuracy/{label}_{nfe}nfe"


def score(scorer: str, nfe: int, held_out: bool) -> str:
    """Mean score of the samples under a preference or reward model; held-out ones were never trained on."""
    return f"val/{'held_out_score' if held_out else 'score'}/{scorer}_{nfe}nfe"


def is_outcome(name: str) -> bool:
    """Whether a series is an outcome: its last value may rank runs."""
    return name.startswith(("val/", "reward/", LOSS_TOTAL)) or name == GRAD_TOTAL_RAW
