"""The configuration's first keys, and the defaults that have changed since.

A hash names a first key whatever its value, as it always has. Every other key came later: a hash names it only where
its value is not its default, so a new version's keys change no older hash (:class:`twinrl.config.Settings`). Nothing is
ever added to the first keys.
"""

from typing import Any

CHANGED_DEFAULTS: dict[str, Any] = {}
"""``Class.key`` of a later key → the default that it came with, where today's is another, as a plain value."""

_KEYS = {
    "RunConfig": "name seed train model data branches time guidance teacher renoise terms reward gradients optim "
    "lr_policy early_stop stability evaluation checkpoint machine launch fsdp run tracking",
    "TrainConfig": "steps batch micro_batch precision init",
    "DataConfig": "source root row_multiple images",
    "TimeLaw": "alpha beta scale consistency_ratio",
    "GuidanceConfig": "strength range form empty",
    "EarlyStop.Config": "patience threshold",
    "EvaluationConfig": "every n nfe guided objective teacher_steps seed captions neighbours velocity_rows "
    "grid_samples batch reference inception",
    "GuidedConfig": "strength nfe",
    # networks and pretrained models
    "ModelConfig": "network target_time family path lora gradient_checkpointing dtype frozen_dtype embedded_guidance",
    "FamilyConfig": "path lora gradient_checkpointing dtype frozen_dtype embedded_guidance",
    "LoraSettings": "rank alpha dropout targets",
    "MLP.Config": "width depth condition_width",
    "DiT.Config": "width depth heads patch expansion condition_width",
    "UNet.Config": "width multipliers attention heads condition_width dropout",
    # terms
    "TermConfig": "branches weight loss time_weight mean_over",
    "RCGMConfig": "order delta clamp",
    "Adversarial.Config": "sample path_noise time time_range reward reward_constant",
    "Rectify.Config": "point clamp score_weight",
    "RealVelocity.Config": "point target",
    "Barron.Config": "alpha c max_ratio",
    "TeacherConfig": "kind decay guidance allow_live",
    # distributions and schedules
    "RenoiseConfig": "placement",
    "BetaRenoise.Config": "alpha beta",
    "LogitNormalRenoise.Config": "location scale",
    "Constant": "number",
    "_Moving": "initial final start",
    "_Ramp": "end",
    "Sigmoid": "steepness",
    # gradients and optimizers
    "GradientsConfig": "space terms each total telemetry",
    "TelemetryConfig": "shares_every cosines_every rms_every update_every",
    "AGC.Config": "ratio eps",
    "Clip.Config": "max_norm",
    "Match.Config": "ratio",
    "Relative.Config": "ratio",
    "Scale.Config": "factor",
    "ZClip.Config": "z alpha warmup",
    "AdamConfig": "betas eps weight_decay",
    "OptimizerConfig": "lr",
    "PolicyConfig": "warmup",
    "CosineLR.Config": "final",
    "DecayOnSpike.Config": "cut minimum recovery",
    "Plateau.Config": "cut patience threshold minimum monitor",
    # stability
    "StabilityConfig": "policy spike drift lr_cut lr_minimum rollbacks rollback_margin watch divergence capsules",
    "CapsuleConfig": "every before most",
    "Watch.Config": "spike drift rms_limit history",
    "Divergence.Config": "absolute relative evaluations accuracy_floor recall_floor after nonfinite_steps",
    "Drift.Config": "factor z window warmup",
    "Spike.Config": "ratio z window warmup floor cooldown",
    # rewards
    "RewardConfig": "model gradient schedule held_out compare_every",
    "RewardModelConfig": "dtype chunk recompute",
    "RewardSchedule": "weight lr_factor",
    "LatentRewardConfig": "estimator eta baseline chunk",
    "FiniteDifferenceConfig": "directions epsilon quantise",
    "Spsa.Config": "directions epsilon",
    "Aesthetic.Config": "checkpoint tower",
    "BlipSizes": "image patch vision_width vision_layers vision_heads text_width text_layers text_heads vocabulary",
    "CLIPScore.Config": "definition repository checkpoint",
    "Compressibility.Config": "quality",
    "Ensemble.Config": "rewards",
    "HPSv2.Config": "version checkpoint architecture",
    "Hinge.Config": "reward ceiling",
    "ImageReward.Config": "checkpoint vocabulary sizes",
    "EnsembleMember": "reward weight mean std",
    "PerPrompt.Config": "reward decay least epsilon",
    "PickScore.Config": "checkpoint",
    "Quadratic.Config": "target",
    # bookkeeping, which no hash names
    "CheckpointConfig": "every keep asynchronous on_error",
    "MachineConfig": "device threads offload",
    "LaunchConfig": "workers address cpus retries",
    "FSDPConfig": "blocks replicate prefetch reshard_last checkpoint_activations cpu_offload frozen watchdog "
    "reduce_every_micro_batch full_precision",
    "RunSection": "dir",
    "TrackingConfig": "mlflow uri experiment",
}
FIRST_KEYS = frozenset(f"{owner}.{key}" for owner, keys in _KEYS.items() for key in keys.split())
