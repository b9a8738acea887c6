"""The classes of other libraries that the laboratory's models are made of; their import takes seconds."""

from twinrl.machine.compat import ensure_torchvision

ensure_torchvision()

from diffusers import AutoencoderKL  # noqa: E402
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg  # noqa: E402

__all__ = ["CLIP", "AutoencoderKL", "CLIPTextCfg", "CLIPVisionCfg"]
