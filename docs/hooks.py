"""What the site has besides docs/: the README as its front page, CONTRIBUTING, CHANGELOG and the notes of experiments/.

Pages link to each other, and to source files, as files of the repository do. Here such links become those of the site;
what is not part of it, source code above all, keeps its words and loses its link.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "experiments/*.md", "experiments/*.png", "experiments/*.svg")
"""Files of the repository that are pages and pictures of the site by the same paths."""
_LINK = re.compile(r"\[([^\[\]]*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what stands outside of docs/."""
    for path in (path for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern))):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Turns links between files of the repository into links between pages."""
    here = Path(page.file.abs_src_path).relative_to(ROOT)

    def turned(link: re.Match[str]) -> str:
        words, path, anchor = link.groups("")
        target = posixpath.normpath(here.parent / path)
        if found := files.get_file_from_path(target.removeprefix("docs/")):
            return f"[{words}]({posixpath.relpath(found.src_uri, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"
        # One that leads nowhere stays as it is, and the build refuses it.
        return words if (ROOT / target).exists() else link[0]

    return _LINK.sub(turned, markdown)
