"""Several processes as one machine: `jax.distributed`, begun by a roll call that cannot hang."""

import socket
import time

import jax

from fishjax.errors import FishjaxError, UsageError

_HELLO = b"fishjax"


def connect(
    address: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: float = 300,
) -> None:
    """Join the processes of one program, before anything else touches a device.

    The runtime of `jax.distributed` ends a process that waits in vain for another one, without saying for
    whom. So a roll call over the same port comes first: process 0 hears from every other one, then all
    go on together.

    Args:
      address: `host:port` of process 0; None leaves all to the detectors of jax (Slurm, Kubernetes, TPU,
        Open MPI), without the roll call.
      processes: how many there are, at least 1.
      process: which one this is, in [0, processes).
      timeout: seconds to wait for the others, > 0.

    Raises:
      UsageError: an argument that makes no sense.
      FishjaxError: a process is missing when the time is over; process 0 says which. Without an `address`,
        no detector knows the others.
    """
    if not timeout > 0:
        raise UsageError(f"`timeout` must be a number of seconds above 0; got {timeout}")
    if address is None:
        try:
            jax.distributed.initialize(initialization_timeout=max(1, int(timeout)))
        except (RuntimeError, ValueError) as error:
            raise FishjaxError(
                f"the processes could not be found or joined within {timeout:g} s: "
                f"{' '.join(str(error).split())[:300]}; name process 0 by `address`, with `processes` and "
                "`process`, and a roll call says which one is missing"
            ) from error
        return
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise UsageError(f"`address` must be host:port of process 0; got `{address}`")
    if type(processes) is not int or type(process) is not int or not 0 <= process < processes:
        raise UsageError(f"`process` must be one of 0 to `processes` - 1; got {process} of {processes}")
    deadline = time.monotonic() + timeout
    if process == 0:
        _hear(host, int(port), processes, deadline, timeout)
    else:
        _call(host, int(port), processes, process, deadline, timeout)
    jax.distributed.initialize(
        address,
        processes,
        process,
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, int(timeout)),
    )


def _hear(host: str, port: int, processes: int, deadline: float, timeout: float) -> None:
    """Wait until every other process has called, then let all go on."""
    here: dict[int, socket.socket] = {}
    try:
        server = socket.create_server((host, port), backlog=processes)
    except OSError as error:
        raise UsageError(f"process 0 cannot listen at `{host}:{port}`: {error.strerror}") from None
    with server:
        while len(here) < processes - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            caller = None
            try:
                caller, _ = server.accept()
                caller.settimeout(max(0.01, min(5.0, deadline - time.monotonic())))
                word, _, numbers = caller.makefile("rb").readline(64).strip().partition(b" ")
                index, count = map(int, numbers.split())
            except (ValueError, ConnectionError):
                if caller is not None:
                    caller.close()  # some other program, or one that hung up
                continue
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue
                missing = [i for i in range(1, processes) if i not in here]
                for caller in here.values():
                    caller.close()
                raise FishjaxError(
                    f"process {', '.join(map(str, missing))} of {processes} did not call `{host}:{port}` "
                    f"within {timeout:g} s; look at its log, and whether it can reach this address"
                ) from None
            if word != _HELLO or count != processes or not 0 < index < processes:
                raise UsageError(f"a process calls itself {index} of {count}; wanted one of {processes}")
            here[index] = caller
        for caller in here.values():
            caller.sendall(_HELLO)
    for caller in here.values():
        caller.close()


def _call(host: str, port: int, processes: int, process: int, deadline: float, timeout: float) -> None:
    """Tell process 0 that this one is here, and wait until it has heard from all."""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise FishjaxError(
                f"process {process} found no process 0 at `{host}:{port}`, or not all {processes} processes "
                f"were there within {timeout:g} s; process 0 says which are missing"
            )
        try:
            with socket.create_connection((host, port), timeout=left) as caller:
                caller.sendall(_HELLO + f" {process} {processes}\n".encode())
                if caller.recv(len(_HELLO)) == _HELLO:
                    return
        except OSError:  # not there yet
            pass
        time.sleep(min(0.1, max(0.0, deadline - time.monotonic())))
