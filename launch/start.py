"""Start the processes of a command: ranks on all devices, or a single process."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch import launcher_command, launcher_process, messages, preflight, ssh
from launch.exit_report import ExitReport
from trainer.runtime import bootstrap
from trainer.runtime.limits import num_cores
from trainer.runtime.log_folder import inference_logs


def start_ranks(
    module: str,
    arguments: Sequence[str],
    output_dir: str,
    ranks_per_host: int | None,
    hostfile: str | None,
    *,
    single: bool = False,
) -> ExitReport:
    """Run a module on all devices of this machine, or on the hosts of a hostfile over ssh.

    A single rank starts without a launcher.

    Args:
        ranks_per_host: None for one rank per GPU, or for the slots of the hostfile.
        single: the command only reads the run; the default without a GPU is one rank.
    """
    log_name = "launcher.log" if module == "trainer" else f"launcher-{module.split('.')[-1]}.log"
    folder = Path(output_dir)
    logs = inference_logs(folder) if single else folder / "logs"
    hosts = launcher_command.read_hostfile(hostfile) if hostfile else []
    if hostfile and not launcher_command.is_local(hosts):
        command = launcher_command.hostfile_command(
            module, arguments, hostfile, ranks_per_host, launcher_command.free_port()
        )
        launcher_command.check_remote([*command[command.index(bootstrap.FILE, 2) :]])
        log = preflight.open_log(logs, log_name)
        ranks = f"{sum(host.slots for host in hosts)} processes on {len(hosts)} hosts"
        messages.note(f"starting {ranks}; logs: {log.parent}")
        messages.note(launcher_command.by_hand(module, arguments, None, hostfile))
        return ssh.run(command, os.environ, log)
    slots = hosts[0].slots if hosts else None
    gpus = launcher_command.visible_gpus(
        launcher_command.list_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    )
    if single and not gpus and ranks_per_host is None:
        ranks_per_host = 1
    devices = launcher_command.choose_devices(
        slots if ranks_per_host is None else ranks_per_host, gpus
    )
    log = preflight.open_log(logs, log_name)
    where = "CPU" if devices.kind == "cpu" else "GPU " + ", ".join(map(str, devices.ids))
    messages.note(f"starting {count(len(devices.ids), 'process')} on {where}; logs: {log.parent}")
    direct = len(devices.ids) == 1
    if not direct:
        messages.note(launcher_command.by_hand(module, arguments, devices, None))
    cores = num_cores()
    environment = launcher_command.environment(os.environ, devices, cores, arguments)

    def start() -> ExitReport:
        if direct:
            command, own = launcher_command.direct_command(module, devices, environment)
            return launcher_process.run_local(command, own, log, module, 1)
        command = launcher_command.local_command(module, devices, launcher_command.free_port())
        return launcher_process.run_local(command, environment, log, module, len(devices.ids))

    report = start()
    # A port that was free may be taken before the ranks bind it, seconds later.
    return start() if report.port_taken else report


def run_alone(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str] = os.environ,
    *,
    imports: str = "torch and transformers",
) -> int:
    """Run a module in a single process and return its exit code.

    The progress message names ``imports``, the slow imports of the module.
    """
    messages.note(f"importing {imports}")
    options = ("--parent-death=SIGTERM", "--arguments-in-environment")
    handed = bootstrap.arguments_in_environment(list(arguments)) | {
        bootstrap.PARENT: str(os.getpid())
    }
    process = launcher_process.start(
        bootstrap.command(module, *options), env={**environment, **handed}
    )
    try:
        return process.wait()
    except BaseException:  # a stop signal
        process.terminate()
        process.wait()
        raise


def count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"
