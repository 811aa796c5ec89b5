"""`maelab demo`: a page in the browser to draw digits on, to hide and rebuild patches, and to compare models."""

import contextlib
import importlib.util
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence

from maelab.config import DataOptions
from maelab.errors import UsageError

SHIPPED = ("maelab:mnist-mae", "maelab:mnist-classifier")


def demo(
    runs: Sequence[str] = (),
    *,
    images: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 7860,
    options: DataOptions | None = None,
) -> Iterator[str]:
    """Open a page to draw digits, hide and rebuild patches, compare models.

    Nothing is stored, and no other host is asked for anything. A browser has to name the host that is listened on, or
    localhost (127.0.0.1, [::1]), else it is refused: a foreign page could otherwise lend its own name to this server.
    With 0.0.0.0 or ::, which other machines reach by many names, any address in numbers and this machine's host name
    will do.

    Args:
        runs: run folders or checkpoints of autoencoders and classifiers; none takes the weights that maelab ships.
        images: file, folder or glob of images to pick from; may be given several times. None takes some of the data
            that the first model was trained on.
        host: address to listen on; any other than this one lets other machines in.
        port: port to listen on; 0 takes a free one.
        options: where to compute.

    Yields:
        The page's address; whoever goes on then serves it until interrupted.

    Raises:
        UsageError, RunError: if Gradio is missing, a run or an image cannot be read, or the address cannot be had.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UsageError("maelab demo needs Gradio: install maelab with its extra, pip install 'maelab[demo]'")
    from maelab.demo import logic

    options = options or DataOptions()
    models = logic.load_models(runs or SHIPPED, options)
    examples = logic.example_images(models[0], images, options.data_dir)
    with tempfile.TemporaryDirectory(prefix="maelab-demo-") as folder, _listen(host, port) as listener:
        # Read when Gradio is imported.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "HF_HUB_DISABLE_TELEMETRY": "1"}
        import uvicorn

        from maelab.demo.page import app, build

        guarded = app(build(models, examples), host, listener.getsockname()[0])
        config = uvicorn.Config(
            guarded, log_level="warning", timeout_graceful_shutdown=1, proxy_headers=False, server_header=False,
            ws="none",
        )  # fmt: skip
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{listener.getsockname()[1]}/"
        with contextlib.suppress(KeyboardInterrupt):  # the usual end
            uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """A socket at this address. Raises UsageError."""
    if not 0 <= port < 65536:
        raise UsageError(f"--port must lie between 0 and 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
            return listener
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; try another --port (0: a free one)"
        ) from error
