"""A real Slurm with two nodes on this machine. Its daemons and jobs end with the `with` block, or with this process."""

import os
import pathlib
import pwd
import re
import shutil
import socket
import subprocess
import sys
import time

PACKAGES = 'slurm-wlm munge'  # names in Debian and Ubuntu
_PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'scontrol')
_PATH = f'{os.environ["PATH"]}:/usr/sbin:/sbin'  # the PATH of a user lacks the folder of the daemons
_LIMIT = 600   # seconds; limit of the waits for a state of a job, as the machine may be busy
_PORTS = range(20_000, 30_000)  # below the range of outgoing connections

# JAX connects to the first node by its name, so this node has the name of the machine. cred_expire is the time after
# which a requeued job may start again, at its least value.
_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
FirstJobId={first_job}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=60
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
GresTypes=gpu
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 {gres}
NodeName={host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 {gres}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1
PartitionName=high Nodes=ALL PriorityTier=2
"""

# Waits until its standard input closes, at the end of the block or of the process of the tests. Then kills every
# process that has the configuration of this Slurm in its environment.
_GUARD = """
import os, pathlib, signal, sys, time
sys.stdin.read()
def belongs(process):
    try:
        return f'SLURM_CONF={sys.argv[1]}'.encode() in (process / 'environ').read_bytes()
    except OSError:
        return False
while pids := [int(path.name) for path in pathlib.Path('/proc').glob('[0-9]*') if belongs(path)]:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    time.sleep(0.05)
"""


def _host():
    return socket.gethostname().partition('.')[0]


def reason_to_skip():
    """Returns the reason why Slurm cannot start on this machine; '' if it can."""
    absent = [name for name in _PROGRAMS if not shutil.which(name, path=_PATH)]
    if absent:
        return f'{", ".join(absent)} not found: apt-get install {PACKAGES}'
    try:
        socket.create_server((_host(), 0)).close()
    except OSError as error:
        return f'{_host()}, the name of this machine, has no address on it ({error}): add it to /etc/hosts'
    return ''


def _free_ports(count):
    free = []
    for port in _PORTS:
        try:
            socket.create_server(('', port)).close()
        except OSError:
            continue
        free.append(port)
        if len(free) == count:
            return free
    raise OSError(f'fewer than {count} free ports in {_PORTS}')


class Slurm:
    """Two nodes with 4 cores each, and a partition `high` whose jobs preempt those of the default partition.

    Args:
      gpus: True to give each node a made-up GPU.
    """

    def __init__(self, folder, *, gpus=True):
        self.folder, self.nodes = folder, (_host(), f'{_host()}-2')
        config = folder / 'slurm.conf'
        self._environment = {**os.environ, 'PATH': _PATH, 'SLURM_CONF': str(config)}
        config.write_text(_CONFIG.format(
            host=_host(), ports=_free_ports(3), user=pwd.getpwuid(os.getuid()).pw_name, folder=folder,
            first_job=os.getpid() % 4000 + 1, gres='Gres=gpu:1' if gpus else ''))
        (folder / 'gres.conf').write_text('Name=gpu File=/dev/zero\n' if gpus else '')

    def __enter__(self):
        self._guard = subprocess.Popen([sys.executable, '-c', _GUARD, self._environment['SLURM_CONF']],
                                       stdin=subprocess.PIPE, start_new_session=True)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self._guard.stdin.close()
        self._guard.wait()
        for daemon in self._daemons:
            daemon.wait()

    def _start(self):
        self._daemons, munge = [], self.folder / 'munge'
        for folder in ('munge', 'state', *(f'spool_{node}' for node in self.nodes)):
            (self.folder / folder).mkdir()
        munge.chmod(0o711)  # munged requires a socket that all users can reach
        (munge / 'key').write_bytes(os.urandom(1024))
        (munge / 'key').chmod(0o400)
        files = {'key-file': 'key', 'socket': 'socket', 'pid-file': 'pid', 'log-file': 'log', 'seed-file': 'seed'}
        self._start_daemon('munged', '--foreground', '--force',
                           *(f'--{option}={munge / name}' for option, name in files.items()))
        self._until((munge / 'socket').exists)
        self._start_daemon('slurmctld', '-D', '-c')
        for node in self.nodes:
            self._start_daemon('slurmd', '-D', '-N', node)
        self._until(lambda: self.run('sinfo', '--noheader', '--format=%t %D', check=False) == 'idle 2')

    def _start_daemon(self, *command):
        with self.log(command[0]).open('a') as log:
            self._daemons.append(subprocess.Popen(command, env=self._environment, stdout=log, stderr=log,
                                                  stdin=subprocess.DEVNULL, start_new_session=True))

    def _until(self, condition):
        end = time.monotonic() + 60
        while not condition():
            logs = '\n'.join(self.log(name).read_text()[-1500:] for name in _PROGRAMS if self.log(name).exists())
            assert time.monotonic() < end, f'Slurm did not start:\n{logs}'
            time.sleep(0.1)

    def log(self, daemon):
        """Returns the path of the log of a daemon."""
        return self.folder / f'{daemon}.log'

    def run(self, *command, check=True, **environment):
        """Runs a command against this Slurm. Returns its standard output."""
        result = subprocess.run([*map(str, command)], env=self._environment | environment, capture_output=True,
                                text=True, stdin=subprocess.DEVNULL, cwd=self.folder, timeout=60, check=False)
        assert not check or result.returncode == 0, f'{command}: {result.stderr}'
        return result.stdout.strip()

    def job(self, number):
        """Returns the fields of `scontrol show job`, such as JobState, Restarts and ExitCode."""
        return dict(re.findall(r'(\w+)=(\S*)', self.run('scontrol', 'show', 'job', number)))

    def tasks(self, number):
        """Returns the process ids of the tasks of a job, in the order of SLURM_PROCID."""
        pids = {}
        for process in pathlib.Path('/proc').glob('[0-9]*'):
            try:
                environment = dict(re.findall(r'(\w+)=([^\0]*)', (process / 'environ').read_bytes().decode()))
                is_python = b'slow_main' in (process / 'cmdline').read_bytes()
            except (OSError, UnicodeDecodeError):
                continue
            if is_python and environment.get('SLURM_CONF') == self._environment['SLURM_CONF'] and (
                    environment.get('SLURM_JOB_ID') == str(number)) and 'SLURM_PROCID' in environment:
                pids.setdefault(int(environment['SLURM_PROCID']), int(process.name))
        return [pids[index] for index in sorted(pids)]

    def wait(self, number, condition, description):
        """Waits until a condition on the fields of a job is true. Returns the fields."""
        end = time.monotonic() + _LIMIT
        while not condition(job := self.job(number)):
            assert time.monotonic() < end, f'job {number}: no {description} in {_LIMIT} s: {job}'
            time.sleep(0.2)
        return job

    def wait_for_end(self, number):
        """Waits until a job is in its final state. Returns its fields."""
        return self.wait(number, lambda job: job['JobState'] not in ('PENDING', 'RUNNING', 'COMPLETING', 'CONFIGURING'),
                         'end')
