"""Pictures of the built site, to be looked at: `python tools/look_at_site.py FOLDER [PAGES]`, at three widths, light and dark (`make docs` first)."""

import functools
import http.server
import sys
import threading
from pathlib import Path

from jupyter_page import CHROMIUM_ARGUMENTS, find_chromium
from playwright.sync_api import sync_playwright

SITE = Path(__file__).parent.parent / "_docs"
WIDTHS = (600, 900, 1280)  # pixels
PAGES = ("index", "gallery", "train_tinyclip", "results/claims", "names", "library/losses_pairs", "guides/bench", "search")


class Quiet(http.server.SimpleHTTPRequestHandler):
    "A server that says nothing"

    def log_message(self, *_) -> None:
        pass


def take(site: Path, folder: Path, pages: tuple[str, ...]) -> None:
    "A picture of the first screen of every page; of the search with its first answers"
    folder.mkdir(parents=True, exist_ok=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_ARGUMENTS)
        for width in WIDTHS:
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=scheme)
                for name in pages:
                    query = "?q=affinity" if name == "search" else ""
                    page.goto(f"http://127.0.0.1:{server.server_port}/{name}.html{query}")
                    page.wait_for_timeout(800)
                    page.screenshot(path=folder / f"{name.replace('/', '_')}-{width}-{scheme}.png")
                page.close()
        browser.close()
    server.shutdown()


if __name__ == "__main__":
    take(SITE, Path(sys.argv[1]), tuple(sys.argv[2:]) or PAGES)
