"""Which IP addresses are on the public internet."""

import ipaddress

_UNICAST = tuple(map(ipaddress.ip_network, ("0.0.0.0/0", "2000::/3")))
"""The ranges that hold all public addresses; `_SPECIAL` excludes parts of them. Other IPv6 ranges are for this machine,
private and link-local networks, multicast, and forms that stand for an IPv4 address (::/96, NAT64)."""

_SPECIAL = tuple(
    map(
        ipaddress.ip_network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # between a provider and its customers; also metadata of a cloud
            "127.0.0.0/8",  # this machine
            "168.63.129.16/32",  # services of a cloud for its own machines
            "169.254.0.0/16",  # link-local, with the metadata of most clouds
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocols; also metadata of a cloud
            "192.0.2.0/24",  # documentation
            "192.31.196.0/24",  # AS112, anycast
            "192.52.193.0/24",  # AMT, anycast
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",  # private
            "192.175.48.0/24",  # AS112
            "198.18.0.0/15",  # measurements
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/3",  # multicast, reserved, broadcast
            "2001::/23",  # protocols, with Teredo, which stands for an IPv4 address
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4, which stands for an IPv4 address
            "2620:4f:8000::/48",  # AS112
            "3fff::/20",  # documentation
        ),
    )
)
"""IANA's special-purpose addresses. Python's own list differs from version to version."""


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet: not this machine, a private network or a cloud's metadata."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return any(ip in network for network in _UNICAST) and not any(ip in network for network in _SPECIAL)
