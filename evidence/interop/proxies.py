"""nginx and HAProxy, with configurations that have no more than they need."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evidence.sockets import HOST

from . import programs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .results import Route

# Of Debian's package libnginx-mod-stream.
STREAM_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")

NGINX = """\
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/nginx.log;
load_module {module};
events {{}}
stream {{
{tcp}
}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
{http}
}}
"""
NGINX_SERVER = {
    "tcp": "server {{ listen {listen}; {option} proxy_pass {origin}; }}",
    "http": "server {{ listen {listen}; {option} "
    "location / {{ proxy_pass http://{origin}; }} }}",
}

# The time-outs are those of Debian's haproxy.cfg.
HAPROXY = """\
defaults
    timeout connect 5s
    timeout client 50s
    timeout server 50s
{tcp}
{http}
"""
HAPROXY_SERVER = {
    mode: f"""\
listen {{listen}}
    mode {mode}
    bind {{listen}}
    {{option}}
    server origin {{origin}}
"""
    for mode in ("tcp", "http")
}


@dataclass(frozen=True)
class Forward:
    route: Route
    port: int
    origin: int


# What each program is run as, and what it is told.
COMMANDS = {
    "nginx": "nginx -e {directory}/nginx.log -c {path}",
    "haproxy": "haproxy -db -f {path}",
}
FRAMES = {"nginx": NGINX, "haproxy": HAPROXY}
SERVERS = {"nginx": NGINX_SERVER, "haproxy": HAPROXY_SERVER}


@contextmanager
def running(program: str, forwards: list[Forward], directory: Path) -> Iterator[None]:
    """*program* in the foreground, listening, until the end of the block."""
    path = directory / f"{program}.conf"
    path.write_text(configuration(program, forwards, directory))
    command = [
        word.format(directory=directory, path=path) for word in COMMANDS[program].split()
    ]
    with programs.running(command, [forward.port for forward in forwards]):
        yield


def configuration(program: str, forwards: list[Forward], directory: Path) -> str:
    servers = {
        mode: "\n".join(
            server.format(
                listen=f"{HOST}:{forward.port}",
                origin=f"{HOST}:{forward.origin}",
                option=forward.route.option,
            )
            for forward in forwards
            if forward.route.mode == mode
        )
        for mode, server in SERVERS[program].items()
    }
    return FRAMES[program].format(directory=directory, module=STREAM_MODULE, **servers)
