"""mkdocs: links that leave docs/ (source files, configs) become the path that they name. They work where the repository is browsed; the
site has no such files. Links inside docs/ are left to mkdocs, which checks them."""

import posixpath
import re
from typing import Any

LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>\.\./[^)\s]*)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    here = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def named(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(here, link["target"]))
        return link[0] if path.startswith("docs/") else f"{link['text']} (`{path}`)" if path not in link["text"] else link["text"]

    return LINK.sub(named, markdown)
