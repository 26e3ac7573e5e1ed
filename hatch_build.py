"""Fits the README to the page of a package index, when the package is built."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

ADDRESS = ""
"""The repository's, such as https://github.com/OWNER/xai_pool_patch; said nowhere else."""

PICTURE = re.compile(r"!\[([^\]]*)\]\((?!https?:)([^)]+)\)\n*")
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)]+)\)")


class Description(MetadataHookInterface):
    """Sets the description and the addresses."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": description(text, ADDRESS),
        }
        urls = {"Background": "https://github.com/livekit/agents/issues/6078"}
        if ADDRESS:
            urls["Repository"] = ADDRESS
            urls["Changelog"] = f"{ADDRESS}/blob/main/CHANGELOG.md"
            urls["Issues"] = f"{ADDRESS}/issues"
        metadata["urls"] = urls


def description(readme: str, address: str) -> str:
    """The README with links that work anywhere. Without an address, relative ones become text."""
    if not address:
        return LINK.sub(r"\1", PICTURE.sub("", readme))
    readme = PICTURE.sub(rf"![\1]({address}/raw/main/\2)\n\n", readme)
    return LINK.sub(rf"[\1]({address}/blob/main/\2)", readme)
