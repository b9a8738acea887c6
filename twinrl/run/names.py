"""Every metric name that twinrl writes, in one place. Imports nothing, so analysis can use it anywhere."""

LOSS_TOTAL = "loss/total"
GRAD_TOTAL_RAW = "grad/total/norm_raw"
GRAD_TOTAL_CLIPPED = "grad/total/norm_clipped"
CLAMP_RCGM = "clamp/rcgm_frac"
CLAMP_DELTA_V = "clamp/delta_v_frac"
DELTA_V_RMS = "delta_v/rms"
RENOISE_ALPHA = "renoise/alpha"
RENOISE_BETA = "renoise/beta"
RENOISE_LOCATION = "renoise/location"
RENOISE_SCALE = "renoise/scale"
RENOISE_T_MEAN = "renoise/t_mean"
REWARD_MEAN = "reward/mean"
REWARD_STD = "reward/std"
REWARD_WEIGHT = "reward/weight"
REWARD_NONFINITE = "reward/nonfinite_frac"
REWARD_GRAD_NORM = "reward/grad/norm"
REWARD_GRAD_SNR = "reward/grad/snr"
REWARD_GRAD_COSINE = "reward/grad/cosine"
REWARD_GRAD_NORM_RATIO = "reward/grad/norm_ratio"
REWARD_ROUNDTRIP = "reward/grad/roundtrip"
LR = "opt/lr"
RMS_MAX = "opt/rms_max"
UPDATE_RATIO = "opt/update_ratio"
UNMOVED = "opt/unmoved_frac"
UNMOVED_MOMENTS = "opt/unmoved_moments_frac"
VAL_QUALITY = "val/quality"
VAL_OBJECTIVE = "val/objective"
VAL_OBJECTIVE_NONFINITE = "val/objective_nonfinite_frac"
VAL_VELOCITY_MSE = "val/velocity_mse"
SKIPPED = "event/skipped"
STEP_SECONDS = "perf/step_seconds"


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


def event(kind: str) -> str:
    """1 at the step of an event of ``kind``, e.g. nonfinite."""
    return f"event/{kind}"


def accuracy(label: str, nfe: int) -> str:
    """Share of the samples of class ``label`` that the judge recognises as that class."""
    return f"val/accuracy/{label}_{nfe}nfe"


def score(scorer: str, nfe: int, held_out: bool) -> str:
    """Mean score of the samples under a preference or reward model; held-out ones were never trained on."""
    return f"val/{'held_out_score' if held_out else 'score'}/{scorer}_{nfe}nfe"


def is_outcome(name: str) -> bool:
    """Whether a series is an outcome: its last value may rank runs."""
    return name.startswith(("val/", "reward/", LOSS_TOTAL)) or name == GRAD_TOTAL_RAW
