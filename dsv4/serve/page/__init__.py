"""The chat page: HTML, CSS and plain JavaScript modules, served as they lie here. No build step, no outside request."""

from importlib import resources

# Everything from this server and nothing inline. Trusted types make the browser refuse any string that is to become
# markup, so text of a model cannot turn into elements even by a slip in the page's own code.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)

_MEDIA_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "theme.js": "text/javascript; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
    "inline.js": "text/javascript; charset=utf-8",
    "markdown.js": "text/javascript; charset=utf-8",
    "store.js": "text/javascript; charset=utf-8",
    "stream.js": "text/javascript; charset=utf-8",
    "tools.js": "text/javascript; charset=utf-8",
    "view.js": "text/javascript; charset=utf-8",
}


def page_files() -> dict[str, tuple[bytes, str]]:
    """Read the page: path -> (content, media type). The page itself is "/", the rest lies under "/page/".

    Meant to be read once, when the server starts; send each with CONTENT_SECURITY_POLICY.
    """
    folder = resources.files(__name__)
    return {
        "/" if name == "index.html" else f"/page/{name}": (folder.joinpath(name).read_bytes(), media_type)
        for name, media_type in _MEDIA_TYPES.items()
    }
