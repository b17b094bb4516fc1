"""What tasks that judge places in an image ask of how evaluation sees it."""

from typing import Any

from kdjax.errors import UserError


def refuse_cut(data: Any) -> None:
    """Raises UserError where the config's section of data lets evaluation see a part of each image only."""
    if data.centre_crop:
        raise UserError(
            "config.data.centre_crop is True, which is for classification: what is found in an image is judged on all "
            "of it; set config.data.centre_crop=False."
        )
