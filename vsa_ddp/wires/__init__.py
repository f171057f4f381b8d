"""Stage 7: how messages cross the ranks. The only room, with `agreement` and `probe`, that calls a collective.

A new wire is a file with a class like those here, which reads as what happens to a message, and a line in `WIRES` and
`config.WireName`; the tests take it from there. `message.Wire` is what it must offer, `link.Link` what it may call.
"""

from vsa_ddp.wires.all_gather import AllGather
from vsa_ddp.wires.all_reduce import AllReduce
from vsa_ddp.wires.courier import Courier
from vsa_ddp.wires.hierarchical import Hierarchical
from vsa_ddp.wires.link import Link, keep_for_current_stream, make_cpu_twin, num_groups_made
from vsa_ddp.wires.message import Mean, Message, Rounds, Wire
from vsa_ddp.wires.seal import Inspection, Subject
from vsa_ddp.wires.two_shot import TwoShot

WIRES: dict[str, Wire] = {"all_gather": AllGather(), "all_reduce": AllReduce(), "two_shot": TwoShot()}
"""The wires that carry compressed messages. `wire="dense"` needs none: every step is an exact one."""

__all__ = [
    "WIRES",
    "AllGather",
    "AllReduce",
    "Courier",
    "Hierarchical",
    "Inspection",
    "Link",
    "Mean",
    "Message",
    "Rounds",
    "Subject",
    "TwoShot",
    "Wire",
    "keep_for_current_stream",
    "make_cpu_twin",
    "num_groups_made",
]
