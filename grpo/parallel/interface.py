"""Finds the network interface by which this machine reaches another one."""

from __future__ import annotations

import fcntl
import socket
import struct
import sys

SIOCGIFADDR = 0x8915  # Linux: the address of an interface


def find_interface(host: str, port: int) -> str | None:
    """Returns the interface whose address is used to reach a host; None if it can't be found.

    gloo otherwise takes that of this machine's own name, which often is the loopback.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # sends nothing
            wanted = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                if read_address(probe, name) == wanted:
                    return name
    except OSError:
        return None
    return None


def read_address(any_socket: socket.socket, interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    try:
        answer = fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, request)
    except OSError:  # it has none
        return None
    return socket.inet_ntoa(answer[20:24])
