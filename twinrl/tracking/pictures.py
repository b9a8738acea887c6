"""Pictures among the charts of an MLflow run, each in place of the one that had its name before.

MLflow's own ``log_image`` keeps every picture under another name, so that a report that is made again would be there
twice, and shows a preview of 256 pixels, in which a figure's text cannot be read.
"""

import shutil
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinrl.config.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

FOLDER = "images"
SHOWN_TAG = "mlflow.loggedImages"
PREVIEW_PIXELS = 1400


def show(client: Any, run: str, pictures: Iterable[Path], group: str) -> None:
    """Log PNG files as pictures that the run's page shows under the heading ``group``."""
    with tempfile.TemporaryDirectory() as folder:
        for path in pictures:
            name = f"{group}~{path.stem}+step+0+timestamp+0+{uuid.uuid5(uuid.NAMESPACE_OID, path.stem)}"
            shutil.copyfile(path, Path(folder, f"{name}.png"))
            _preview(path, Path(folder, f"{name}+compressed.webp"))
        if any(Path(folder).iterdir()):
            client.log_artifacts(run, folder, FOLDER)
            client.set_tag(run, SHOWN_TAG, "True")


def _preview(path: Path, target: Path) -> None:
    image = opened(path)
    image.thumbnail((PREVIEW_PIXELS, PREVIEW_PIXELS))
    image.save(target, quality=90)


def opened(path: Path) -> "Image.Image":
    """A picture of a run, whole; it is a PNG: a file of another format may start a program, as EPS does.

    Raises:
        InputError: it is damaged, or something else.
        OSError: it may not be read.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"{path} is no whole PNG", got=error, fix="delete or restore it") from error
