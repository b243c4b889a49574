"""Addresses that services listen on."""

import ipaddress
import socket

from fourfold.errors import FourfoldError


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host's address; of names, only localhost is known to be such."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free. Raises FourfoldError when the address cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise FourfoldError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    # Connections inherit it. asyncio sets it on sockets of IPPROTO_TCP only, and this one was made without a protocol;
    # else the chunks of a stream wait up to 40 ms for the client's delayed acknowledgements.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
