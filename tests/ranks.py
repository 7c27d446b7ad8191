"""Runs a function on several ranks, as forked processes on this machine that gloo connects."""

import multiprocessing
import os
import socket
import traceback

import torch

TIMEOUT = 120  # seconds


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(count, function, *arguments):
    """What ``function(rank, *arguments)`` returned on each rank: plain values, or an exception.

    An exception is given back as (name of its type, text).
    """
    context = multiprocessing.get_context("fork")
    port, processes, ends = free_port(), [], []
    for rank in range(count):
        end, other = context.Pipe()
        process = context.Process(target=_one, args=(other, rank, count, port, function, arguments))
        process.start()
        other.close()
        processes.append(process)
        ends.append(end)
    results = []
    try:
        for end in ends:
            assert end.poll(TIMEOUT), "a rank does not answer"
            try:
                results.append(end.recv())
            except EOFError:  # killed
                results.append(None)
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return results


def _one(end, rank, count, port, function, arguments):
    torch.set_num_threads(1)  # a forked OpenMP has no threads
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        end.send(function(rank, *arguments))
    except Exception as error:
        traceback.print_exc()
        end.send((type(error).__name__, str(error)))
    end.close()
    os._exit(0)  # not through what the parent wanted done at its own exit
