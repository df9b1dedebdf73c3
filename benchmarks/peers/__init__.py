"""Other tools that show values of a running GRU, in the order of the table."""

from __future__ import annotations

from benchmarks.peers.loops import LOOPS
from benchmarks.peers.nnsight import NNSIGHT
from benchmarks.peers.opacus import OPACUS
from benchmarks.peers.peer import Peer
from benchmarks.peers.pyvene import PYVENE
from benchmarks.peers.torchlens import TORCHLENS

PEERS: tuple[Peer, ...] = (*LOOPS, OPACUS, *PYVENE, *TORCHLENS, NNSIGHT)
