"""The server of a page in the browser, on this machine only unless another address is named."""

from __future__ import annotations

import contextlib
import io
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import viser


def open_page(host: str, port: int, label: str | None = None) -> viser.ViserServer:
    """A viser server with a 3D scene, Y up, on `port` or the next free one; its camera looks at the unit ball.

    ImportError if viser is not installed; ValueError for a port or host that is none of this machine's.
    """
    check_address(host, port)
    try:
        import viser
    except ImportError:
        raise ImportError("the page in the browser needs viser: pip install 'text3d-fast[viewer]'") from None
    with contextlib.redirect_stdout(io.StringIO()):  # a box with the address, which is ours to print
        server = viser.ViserServer(host=host, port=port, label=label, verbose=False)
    server.gui.configure_theme(show_share_button=False)  # which would open the page to everybody
    server.scene.set_up_direction("+y")
    # the default environment's light alone burns out bright colours
    server.scene.configure_environment_map("studio", environment_intensity=0.3)
    server.initial_camera.position = (1.2, 0.9, 2.6)
    server.initial_camera.look_at = (0.0, 0.0, 0.0)
    return server


def close_page(server: viser.ViserServer) -> None:
    """Send what is waiting, and end."""
    server.flush()
    with contextlib.redirect_stdout(io.StringIO()):
        server.stop()


def address_of(server: viser.ViserServer) -> str:
    """What to type into the browser."""
    host = server.get_host()
    shown = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::", "::1") else host
    return f"http://{shown}:{server.get_port()}"


def check_address(host: str, port: int) -> None:
    """ValueError for what the server would fail at in its own thread, without anybody noticing."""
    if not 1 <= port <= 65535:
        raise ValueError(f"port: expected 1 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.bind(address)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host: {host!r} is no address of this machine ({error})") from None
