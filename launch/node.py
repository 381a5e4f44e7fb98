"""Start one host's ranks of a multi-host run, without ssh; run on every host.

    python trainer/runtime/bootstrap.py launch.node --hosts n1,n2 --slots 8 --node-rank 0 \
        --master-addr n1 --master-port 12345 RUN.yaml [key=value ...]

Unlike ``promptshard train --no-ssh`` it does not check the data first: ``promptshard submit`` has
done that, and every restart of a job runs this.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from launch import launcher_command, launcher_process, messages, preflight
from launch.exit_report import ExitReport
from launch.launcher_command import Host, Place
from launch.start import count
from trainer.config import load
from trainer.runtime.errors import EXIT_BAD_INPUT, EXIT_DONE, BadInput
from trainer.runtime.limits import num_cores

DEFAULT_PORT = 29500  # default of torch and DeepSpeed; must be the same on all hosts
GRACE_SECONDS = 3600.0  # to save and exit; Slurm's time limit usually ends the job earlier
REACH_SECONDS = 3.0


def run(
    module: str, arguments: Sequence[str], output_dir: str, place: Place, *, need_gpus: bool = False
) -> ExitReport:
    """Start this host's ranks and wait for them.

    Args:
        need_gpus: refuse a host without GPUs instead of running on CPU.

    Raises:
        BadInput: this host has fewer GPUs than slots, cannot resolve the first host, or is the
            first host and its port is in use.
    """
    name, slots = place.host.name, place.host.slots
    gpus = launcher_command.visible_gpus(
        launcher_command.list_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    )
    if len(gpus) < slots and (gpus or need_gpus):
        raise BadInput(
            f"{name}: {count(len(gpus), 'GPU')} visible, but {slots} processes requested; request "
            "fewer GPUs per host, or leave this host out"
        )
    if place.rank == 0:
        refuse_taken(place.port)
    devices = launcher_command.choose_devices(slots, gpus)
    cores = num_cores()
    environment = launcher_command.environment(os.environ, devices, cores, arguments)
    if interface := _interface(place):
        # gloo would use the address of this host's name, which is 127.0.1.1 on Debian
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    log = preflight.open_log(Path(output_dir) / "logs", f"launcher-host{place.rank}.log")
    if place.rank == 0:
        total = sum(host.slots for host in place.hosts)
        where = f"on {len(place.hosts)} hosts, rendezvous at {place.address}:{place.port}"
        messages.note(f"starting {total} processes {where}; logs: {log.parent}")
    command = launcher_command.place_command(module, place, devices)
    report = launcher_process.run_local(
        command, environment, log, module, slots, GRACE_SECONDS, place.rank * slots
    )
    if report.code in (EXIT_DONE, EXIT_BAD_INPUT):
        return report
    reasons = [report.message] if report.message else []
    if silent := [host.name for host in place.others if not reaches(host, place.port)]:
        reasons.append(f"lost: no answer from {', '.join(silent)}")
    return ExitReport(report.code, f"{name}: {'; '.join(reasons)}" if reasons else "")


def refuse_taken(port: int) -> None:
    """Raise ``BadInput`` for a port that cannot be bound; ranks would fail only after minutes."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # like torch's TCPStore
        try:
            probe.bind(("", port))
        except OSError as error:
            raise BadInput(
                f"--master-port: {port} cannot be used on this host: {error.strerror}; give "
                "another, the same on all hosts (a Slurm job has another one if it is submitted "
                "again)"
            ) from None


def reaches(host: Host, port: int) -> bool:
    """Whether a host answers; a refused connection counts as an answer."""
    try:
        socket.create_connection((host.name, port), REACH_SECONDS).close()
    except OSError as error:
        return isinstance(error, ConnectionRefusedError)
    return True


def _interface(place: Place) -> str | None:
    """Return the network interface that reaches the other hosts; None if there are none."""
    for target in (place.address, *[host.name for host in place.others][:1]):
        try:
            resolved = socket.getaddrinfo(target, place.port, type=socket.SOCK_DGRAM)
            family, _, _, _, address = resolved[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)  # sends nothing
                own = probe.getsockname()[0]
        except OSError as error:
            if target == place.address:
                raise BadInput(
                    f"--master-addr: {target!r} cannot be reached from {place.host.name}: "
                    f"{error.strerror}; give a name or address that all hosts can resolve"
                ) from None
    if not place.others:
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, used in interfaces if own in [a.address for a in used]), None)


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of a Slurm task; returns the exit code."""
    parser = argparse.ArgumentParser(prog="launch.node", description=__doc__)
    parser.add_argument("--hosts", required=True, type=lambda text: text.split(","))
    parser.add_argument("--slots", type=int, required=True, help="ranks of every host")
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--master-addr", required=True)
    parser.add_argument("--master-port", type=int, required=True)
    parser.add_argument("--need-gpus", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("run")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args(words)
    try:
        hosts = tuple(Host(name, args.slots) for name in args.hosts)
        place = Place(hosts, args.node_rank, args.master_addr, args.master_port)
        flags = [f"--{name}" for name in ("fresh", "verbose") if getattr(args, name)]
        arguments = [args.run, *args.overrides, *flags]
        output_dir = load(args.run, args.overrides).output_dir
        report = run("trainer", arguments, output_dir, place, need_gpus=args.need_gpus)
    except BadInput as error:
        messages.problems(error.problems)
        return EXIT_BAD_INPUT
    messages.show(report)
    return report.code


def place_of(hostfile: str, rank: int | None, address: str | None, port: int | None) -> Place:
    """Return this host's position among the hosts of a hostfile; ``BadInput`` if invalid."""
    hosts = tuple(launcher_command.read_hostfile(hostfile))
    last = len(hosts) - 1
    problems = []
    if rank is None:
        problems.append(
            f"--no-ssh: needs --node-rank, the index of this host in {hostfile}: 0 to {last}"
        )
    elif not 0 <= rank <= last:
        problems.append(
            f"--node-rank: {rank} is not an index of a host in {hostfile}; give 0 to {last}"
        )
    port = DEFAULT_PORT if port is None else port
    if not 0 < port < 65536:
        problems.append(f"--master-port: {port} is not a valid TCP port; give 1024 to 65535")
    if problems:
        raise BadInput(problems)
    assert rank is not None
    return Place(hosts, rank, address or hosts[0].name, port)


if __name__ == "__main__":
    sys.exit(main())
