"""What else shows something of a running GRU, in the order of the table."""

from __future__ import annotations

from tests.benchmarks.peers.loops import LOOPS
from tests.benchmarks.peers.nnsight import NNSIGHT
from tests.benchmarks.peers.opacus import OPACUS
from tests.benchmarks.peers.peer import Peer
from tests.benchmarks.peers.pyvene import PYVENE
from tests.benchmarks.peers.torchlens import TORCHLENS

PEERS: tuple[Peer, ...] = (*LOOPS, OPACUS, *PYVENE, *TORCHLENS, NNSIGHT)
