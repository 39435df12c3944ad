"""What a payload costs in time on the links that federated learning meets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A link between one client and the server, the same for every client.

    Attributes
    ----------
    name : str
    uplink, downlink : float
        Bandwidth in bits a second.
    latency : float
        Seconds until the first bit arrives, in either direction.
    """

    name: str
    uplink: float
    downlink: float
    latency: float

    def seconds(self, downlink_bytes: int, uplink_bytes: int) -> float:
        """Return the seconds to receive one message and to send one.

        Clients do not share bandwidth, so a synchronous round waits for the largest value among those sampled.
        No loss, retransmission, protocol header or computing time is modelled.

        Examples
        --------
        >>> Link("example", uplink=8e3, downlink=16e3, latency=0.5).seconds(downlink_bytes=4000, uplink_bytes=1000)
        4.0
        """
        return (
            2 * self.latency + 8 * downlink_bytes / self.downlink + 8 * uplink_bytes / self.uplink
        )


LINKS = {
    link.name: link
    for link in (
        Link("nb-iot", uplink=62e3, downlink=26e3, latency=1.6),
        Link("lte-m", uplink=1e6, downlink=1e6, latency=0.1),
        Link("lte", uplink=10e6, downlink=30e6, latency=0.05),
        Link("5g", uplink=50e6, downlink=300e6, latency=0.02),
        Link("wifi", uplink=100e6, downlink=100e6, latency=0.005),
    )
}
"""Presets, rounded and typical rather than guaranteed.

nb-iot and lte-m: the peak rates of the 3GPP Release 13 categories NB1 (multi-tone) and M1 (full duplex), with the
latencies usually quoted for good coverage (NB-IoT may take 10 s at its edge, the design limit of TR 45.820). lte and
5g: order of magnitude of the rates and round trips that users measure on public networks, far below the categories'
peaks. wifi: an 802.11n/ac home network.
"""


def parse_link(text: str) -> Link:
    """Return a preset by name, or a link from "uplink,downlink,latency" in Mbit/s, Mbit/s and ms.

    Raises
    ------
    ValueError
        If the text is neither, or a figure is not positive (latency: negative).

    Examples
    --------
    >>> parse_link("0.25,1,80")
    Link(name='0.25,1,80', uplink=250000.0, downlink=1000000.0, latency=0.08)
    """
    if text in LINKS:
        return LINKS[text]
    try:
        uplink, downlink, latency = (float(figure) for figure in text.split(","))
    except ValueError:
        uplink = downlink = latency = 0.0
    if not (
        0 < uplink < float("inf") and 0 < downlink < float("inf") and 0 <= latency < float("inf")
    ):
        raise ValueError(
            f"unknown link {text!r}; one of {', '.join(LINKS)}, or UPLINK,DOWNLINK,LATENCY in Mbit/s, Mbit/s and ms"
        )
    return Link(text, uplink=uplink * 1e6, downlink=downlink * 1e6, latency=latency / 1e3)
