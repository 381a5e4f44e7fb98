"""Start what a command runs: ranks on devices, or one process."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from launch import local, messages, preflight, processes, remote
from launch.endings import ExitReport
from trainer.runtime import bootstrap


def start_ranks(
    module: str,
    arguments: Sequence[str],
    output_dir: str,
    ranks_per_host: int | None,
    hostfile: str | None,
) -> ExitReport:
    """Run a module on all devices of this machine, or on the hosts of a hostfile over ssh.

    Args:
        arguments: of the module.
        output_dir: where the logs go.
        ranks_per_host: ranks per machine; None for one per GPU.
    """
    log_name = "launcher.log" if module == "trainer" else f"launcher-{module.split('.')[-1]}.log"
    hosts = local.read_hostfile(hostfile) if hostfile else []
    if hostfile and not local.is_local(hosts):
        command = local.hostfile_command(
            module, arguments, hostfile, ranks_per_host, local.free_port()
        )
        local.check_remote([*command[command.index(bootstrap.FILE, 2) :]])
        log = preflight.open_log(output_dir, log_name)
        ranks = f"{sum(host.slots for host in hosts)} processes on {len(hosts)} hosts"
        messages.note(f"starting {ranks}; logs: {log.parent}")
        messages.note(local.by_hand(module, arguments, None, hostfile))
        return remote.run(command, os.environ, log)
    slots = hosts[0].slots if hosts else None
    gpus = local.visible_gpus(local.list_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    devices = local.choose_devices(slots if ranks_per_host is None else ranks_per_host, gpus)
    log = preflight.open_log(output_dir, log_name)
    where = "CPU" if devices.kind == "cpu" else "GPU " + ", ".join(map(str, devices.ids))
    messages.note(f"starting {count(len(devices.ids), 'process')} on {where}; logs: {log.parent}")
    messages.note(local.by_hand(module, arguments, devices, None))
    cores = len(os.sched_getaffinity(0))
    environment = local.environment(os.environ, devices, cores, arguments)

    def start() -> ExitReport:
        command = local.local_command(module, devices, local.free_port())
        return processes.run_local(command, environment, log, module, len(devices.ids))

    ending = start()
    # A port that was free may be taken before the ranks bind it, seconds later.
    return start() if ending.port_taken else ending


def run_alone(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str] = os.environ,
    *,
    imports: str = "torch and transformers",
) -> int:
    """Run a module in one process of its own and return its exit code.

    Args:
        imports: libraries that take seconds to import.
    """
    messages.note(f"importing {imports}")
    options = ("--parent-death=SIGTERM", "--arguments-in-environment")
    handed = bootstrap.handed(list(arguments)) | {bootstrap.PARENT: str(os.getpid())}
    process = processes.start(bootstrap.command(module, *options), env={**environment, **handed})
    try:
        return process.wait()
    except BaseException:  # a stop signal
        process.terminate()
        process.wait()
        raise


def count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"
