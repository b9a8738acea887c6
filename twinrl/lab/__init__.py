"""Laboratories: pictures with a latent space, captions, rewards and judges. The digits' is built in two minutes.

Everything that TwinFlow, its reward terms and their evaluation need at the scale of a laptop: a true
autoencoder, a text-conditioned flow-matching teacher, a CLIP, a preference model, and judges that training
never sees.
"""

from twinrl.lab.load import load_lab, open_lab
from twinrl.lab.recipe import LabRecipe
from twinrl.lab.source import Lab

__all__ = ["Lab", "LabRecipe", "load_lab", "open_lab"]
