"""Where servers listen: an address of this machine, as the user says it, as it is bound, and as it is reached."""

import errno
import ipaddress
import socket
from dataclasses import dataclass

import psutil

LOOPBACK = "127.0.0.1"
NEAREST = {"0.0.0.0": LOOPBACK, "::": "::1"}  # how this machine reaches what listens on every address


@dataclass(frozen=True)
class Host:
    """What `--host` says."""

    name: str
    """In the user's words."""
    address: str
    """The IP address that is bound."""

    @property
    def wide(self) -> bool:
        """Whether other machines may reach it."""
        return not ipaddress.ip_address(self.address).is_loopback

    @property
    def near(self) -> str:
        """This machine's way to it, as a part of a URL."""
        return in_url(NEAREST.get(self.address, self.address))

    @property
    def shown(self) -> str:
        """Another machine's way to it, as a part of a URL."""
        return in_url(socket.gethostname() if self.address in NEAREST else self.name)

    def names(self) -> list[str]:
        """All that may stand for it in a URL: what a browser is allowed to call it."""
        found = {self.shown, self.near}
        if self.address in NEAREST:
            family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
            addresses = [each for all_of_one in psutil.net_if_addrs().values() for each in all_of_one]
            found |= {in_url(each.address) for each in addresses if each.family == family and "%" not in each.address}
        return sorted(found)


LOCAL = Host(LOOPBACK, LOOPBACK)


def listening(host: str) -> Host:
    """An IP address, or the first that a name stands for, IPv4 before IPv6.

    Raises:
        ValueError: `host` is neither, or an address that no URL can say.
    """
    if "%" in host or host.lower().startswith("::ffff:"):
        raise ValueError(f"--host {host}: an address of one link, or IPv4 in IPv6's clothes; name a plain address")
    try:
        found = socket.getaddrinfo(host or " ", None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        raise ValueError(f"--host {host!r}: must be an IP address or a name of this machine, without a port") from None
    addresses = [str(entry[4][0]) for entry in found]
    first = next((each for each in addresses if ":" not in each), addresses[0])
    return Host(first if host[:1].isdigit() else host, first)


def in_url(host: str) -> str:
    """An address or name as a part of a URL: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def must_be_free(host: Host, port: int, option: str) -> None:
    """Check that nobody listens on `port`.

    Raises:
        ValueError: somebody does, or this machine has no such address.
    """
    if not 0 < port < 65536:
        raise ValueError(f"{option} {port}: must be 1 to 65535")
    with socket.socket(socket.AF_INET6 if ":" in host.address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.address, port))
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise ValueError(f"--host {host.name}: this machine has no address {host.address}") from None
            raise ValueError(f"port {port} is taken: end what listens there, or choose another with {option}") from None
