"""Keeping torch to one thread in a thread of ours.

torch shares its work among a team of threads, and every thread that calls it gets a team of its
own. Once there are more of them than cores, OpenMP has all of them sleep where they would wait for
each other, be anything going on or not: a model's layers, which wait at every step, took two to
five times as long from when on the thread that writes a file had computed gates.
"""

from __future__ import annotations

import threading

import torch


class _Kept(threading.local):
    done = False


_here = _Kept()


def keep_to_one_thread() -> None:
    """Have torch make no team for the calling thread, from now on."""
    if _here.done:
        return
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    # It also is what threads get that are new to torch from now on: they get what they would have.
    again = threading.Thread(target=torch.set_num_threads, args=(number,))
    again.start()
    again.join()
    _here.done = True
