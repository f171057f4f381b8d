"""Where this machine stands on the network that the hosts of a job share. Standard library only.

    python -m launch.network host0:29400      # prints: ADDRESS INTERFACE IS_HOST, as 10.88.0.11 eth0 0

torchrun and gloo go by the host's name, and fail where that resolves to loopback, as it does on many installations.
The route to the rendezvous says it better: which address this machine has for the others, on which interface, and
whether it is the rendezvous host itself.
"""

import socket
import struct
import sys
from collections.abc import Iterator

_SIOCGIFADDR = 0x8915  # Linux


def own_address(host: str, port: int) -> str:
    """The IPv4 address from which this machine reaches the host. Sends nothing.

    Raises: OSError if the host has no address or there is no route to it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        address: str = probe.getsockname()[0]
    return address


def interface_of(address: str) -> str | None:
    """The interface whose first address this is; None if there is none."""
    return next((name for name, first in _first_addresses() if first == address), None)


def _first_addresses() -> Iterator[tuple[str, str]]:
    if sys.platform != "linux":
        return
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(control, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an address
                continue
            yield name, socket.inet_ntoa(answer[20:24])


def main(endpoint: str) -> str:
    """One line for launch/multi_node.sh. An interface that is not known is `-`.

    Raises: OSError, or ValueError for a name that means loopback here and another machine elsewhere.
    """
    host, port = endpoint.rsplit(":", 1)
    address = own_address(host, int(port))
    if address.startswith("127.") and host != "localhost" and not host.startswith("127."):
        raise ValueError(f"{host} resolves to loopback on this machine; give its address on the shared network")
    is_host = address in {info[4][0] for info in socket.getaddrinfo(host, None, socket.AF_INET)}
    return f"{address} {interface_of(address) or '-'} {int(is_host)}"


if __name__ == "__main__":
    try:
        print(main(sys.argv[1]))
    except (OSError, ValueError) as error:
        sys.exit(f"error: RENDEZVOUS={sys.argv[1]}: {error}")
